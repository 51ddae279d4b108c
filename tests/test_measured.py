"""A result names all code of this repository that it depends on: it is stale when any of it changes."""

import ast
from collections.abc import Iterator

import pytest

from bench import counts
from bench.digest import ROOT
from bench.scaling import __main__ as scaling

# What says where and when something was measured: no number depends on them.
RECORDING = {"bench/__init__.py", "bench/digest.py", "bench/environment.py"}


def files(module: str) -> Iterator[str]:
    """The files that importing a module of this repository runs, relative to its root."""
    names = module.split(".")
    for n in range(1, len(names) + 1):
        path = "/".join(names[:n])
        yield from (file for file in (f"{path}.py", f"{path}/__init__.py") if (ROOT / file).is_file())


def imported(file: str) -> Iterator[str]:
    """Modules that a file imports, and names which may be modules."""
    for node in ast.walk(ast.parse((ROOT / file).read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.module is not None, "imports in this repository are absolute"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def depends_on(entry: str) -> set[str]:
    """A file and all files of this repository that it imports, and those that they import."""
    found, waiting = set(), [entry]
    while waiting:
        file = waiting.pop()
        if file not in found:
            found.add(file)
            waiting += [of for module in imported(file) for of in files(module)]
    return found


@pytest.mark.parametrize(
    ("entry", "measured"),
    [("bench/counts.py", counts.MEASURED), ("bench/scaling/__main__.py", scaling.MEASURED)],
    ids=["counts", "scaling"],
)
def test_all_code_that_is_imported_is_named(entry, measured):
    # A package's __init__ runs when any module of it does; those of bench hold a docstring alone.
    needed = {file for file in depends_on(entry) - RECORDING if not is_empty(file)}
    missing = {f for f in needed if not any(f == of or f.startswith(f"{of}/") for of in measured)}
    assert not missing
    unused = {of for of in measured if not any(f == of or f.startswith(f"{of}/") for f in needed)}
    assert not unused, "a change of what no number depends on makes nothing stale"


def is_empty(file: str) -> bool:
    """Whether a file holds nothing but a docstring."""
    body = ast.parse((ROOT / file).read_text()).body
    return all(isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) for node in body)
