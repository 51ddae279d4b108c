"""Calls that can run what is in a file, found in the source: pickles, unsafe YAML, evaluated text, shells."""

import ast
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

from bench.digest import ROOT

FOLDERS = ("stochca", "stochca_kernels", "bench", "examples")

_ALWAYS = {
    *("eval", "exec", "builtins.eval", "builtins.exec"),
    *("os.system", "os.popen", "subprocess.getoutput", "subprocess.getstatusoutput"),
    *(
        f"{module}.{name}"
        for module in ("pickle", "_pickle", "dill", "cloudpickle")
        for name in ("load", "loads")
    ),
    *("pickle.Unpickler", "dill.Unpickler", "marshal.load", "marshal.loads", "shelve.open", "joblib.load"),
    *("jsonpickle.decode", "pandas.read_pickle", "torch.jit.load", "torch.package.PackageImporter"),
    *(f"yaml.{name}" for name in ("unsafe_load", "unsafe_load_all", "full_load", "full_load_all")),
    *(f"yaml.{name}" for name in ("UnsafeLoader", "FullLoader", "Loader")),
}
_SAFE_YAML = {"yaml.SafeLoader", "yaml.CSafeLoader"}
_WEIGHTS_ONLY = {
    *("torch.load", "torch.hub.load_state_dict_from_url", "torch.serialization.load"),
    *("timm.models.load_state_dict", "timm.models.load_checkpoint", "timm.models._helpers.load_state_dict"),
}


def unsafe_loads(folders: Iterable[Path] = tuple(ROOT / name for name in FOLDERS)) -> list[str]:
    """All findings below the folders, as "file:line: what"."""
    files = sorted(file for folder in folders for file in folder.rglob("*.py"))
    return [
        f"{file.relative_to(ROOT) if file.is_relative_to(ROOT) else file}:{line}: {what}"
        for file in files
        for line, what in findings(file.read_text())
    ]


def findings(source: str) -> list[tuple[int, str]]:
    """Line and call of each finding in the text of a module."""
    tree = ast.parse(source)
    names = dict(_imported(tree))
    nodes = (node for node in ast.walk(tree) if isinstance(node, ast.Call | ast.Attribute | ast.Name))
    found = {(node.lineno, what) for node in nodes if (what := _unsafe(node, names)) is not None}
    return sorted(found)


def _imported(tree: ast.AST) -> Iterator[tuple[str, str]]:
    """The names that a module imports, and what they stand for."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((a.asname, a.name) for a in node.names if a.asname)
        elif isinstance(node, ast.ImportFrom):
            yield from ((a.asname or a.name, f"{node.module}.{a.name}") for a in node.names)


def _unsafe(node: ast.Call | ast.Attribute | ast.Name, names: Mapping[str, str]) -> str | None:
    """What is unsafe about a node, None where nothing is."""
    if not isinstance(node, ast.Call):
        name = _name(node, names)
        return name if name in _ALWAYS else None  # also where it is handed on, and called elsewhere
    name = _name(node.func, names)
    given = {keyword.arg: keyword.value for keyword in node.keywords}
    if name in _WEIGHTS_ONLY and not _is(given.get("weights_only"), True):
        return f"{name} without weights_only=True"
    if name in ("yaml.load", "yaml.load_all"):
        loader = given.get("Loader", node.args[1] if len(node.args) > 1 else None)
        if loader is None or _name(loader, names) not in _SAFE_YAML:
            return f"{name} without SafeLoader"
    for argument in ("allow_pickle", "shell", "trust_remote_code"):
        if argument in given and not _is(given[argument], False):
            return f"{name or '...'} with {argument}={ast.unparse(given[argument])}"
    return None


def _name(node: ast.AST, names: Mapping[str, str]) -> str | None:
    """The full name of a dotted one, as "torch.load" where `from torch import load` is called as `load`."""
    if isinstance(node, ast.Attribute):
        base = _name(node.value, names)
        return None if base is None else f"{base}.{node.attr}"
    return names.get(node.id, node.id) if isinstance(node, ast.Name) else None


def _is(node: ast.AST | None, value: bool) -> bool:
    return isinstance(node, ast.Constant) and node.value is value
