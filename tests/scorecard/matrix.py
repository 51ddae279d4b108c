"""The oldest and the newest of what is supported: installed into empty environments, and tested there."""

import atexit
import functools
import json
import re
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

from bench.digest import ROOT
from tests.scorecard import distributions, vulnerabilities
from tests.scorecard.environments import TOOLS, Venv, empty
from tests.scorecard.row import Case, Figures

# The operator knows torch and Triton alone, and is tested before anything else is installed.
OPERATOR = ("tests/kernels/test_operator.py",)
TESTS = (
    "tests/method/test_exact.py",
    "tests/method/test_families.py",
    "tests/train/test_train.py",
    "tests/train/test_cli.py",
    "tests/test_readme.py",
)
EXPORTS = ("tests/export/test_timm_folder.py",)
WITHOUT_TRITON = ("tests/train/test_train.py", "-k", "it_learns or evaluates_as_it_did")
ALONE = """
import importlib.util, torch, stochca_kernels
assert importlib.util.find_spec("timm") is None
q = torch.randn(2, 3, 5, 16, requires_grad=True)
out = stochca_kernels.stochca_attention(q, (q, q), (q.detach(), q.detach()), torch.tensor([True, False]))
out.sum().backward()
"""
EXPORTING = "import timm; print(tuple(map(int, timm.__version__.split('.')[:3])) >= (1, 0, 26))"


class Environment(NamedTuple):
    """One column of the matrix.

    Args:
        name: As the page says it.
        python: Its version.
        packages: What is asked for by version; "oldest" for the oldest release of every dependency.
        of: What is installed, "wheel" or "sdist".
        options: Of every installation.
        left_out: Tests of what these releases cannot do, and what is refused by name with them.
    """

    name: str
    python: str
    packages: tuple[str, ...]
    of: str
    options: tuple[str, ...] = ()
    left_out: str = ""


ENVIRONMENTS = (
    Environment("newest of everything", "3.13", (), "wheel"),
    # NaFlexVit needs timm 1.0.24, a pickle torch 2.10.
    Environment(
        "oldest of everything",
        "3.10",
        ("oldest",),
        "sdist",
        left_out="naflex or weights_are_read_from_a_file",
    ),
    # The interpreter of this Triton, which the tests of the operator run in, cannot do with newer NumPy.
    Environment("in between", "3.12", ("torch==2.10.0", "timm==1.0.24", "numpy<2.4"), "wheel"),
    Environment("pinned", "3.11", (), "sdist", ("--constraint", str(ROOT / "constraints.txt"))),
)


def cases(long: bool) -> Iterator[Case]:
    if not long:
        yield Case("declared packages", distributions.check_declaration)
        return
    yield Case("contents of wheel and sdist", _contents)
    for environment in ENVIRONMENTS:
        yield Case(environment.name, _tested(environment))
    yield Case("known vulnerabilities of the dependencies", _vulnerabilities(declared=True))
    yield Case("known vulnerabilities of what they bring", _vulnerabilities(declared=False))


@functools.cache
def _distributions() -> tuple[Path, Path, Path]:
    """Wheel and sdist of the tree, and the wheel that is built from the sdist."""
    folder = Path(tempfile.mkdtemp())
    atexit.register(shutil.rmtree, folder)
    left_out = shutil.ignore_patterns(".*", "__pycache__", "*.egg-info", "runs", "build")
    shutil.copytree(ROOT, folder / "tree", ignore=left_out)
    with empty("3.11") as venv:
        venv.pip("install", "build")
        wheel, sdist = distributions.build(venv.python, folder / "tree", folder / "built")
        shutil.unpack_archive(sdist, folder / "unpacked")
        (unpacked,) = (folder / "unpacked").iterdir()
        again, _ = distributions.build(venv.python, unpacked, folder / "again")
    return wheel, sdist, again


def _contents() -> Figures:
    wheel, sdist, again = _distributions()
    distributions.check_contents(wheel, sdist)
    distributions.check_same(wheel, again)
    return {"cases": 2}


def _tested(environment: Environment) -> Callable[[], Figures]:
    def check() -> Figures:
        wheel, sdist, _ = _distributions()
        packages = (
            distributions.oldest_of(wheel) if "oldest" in environment.packages else environment.packages
        )
        with empty(environment.python, environment.options) as venv:
            # With what the tests of the operator need beside torch and Triton
            alone = [package for package in packages if package.startswith(("torch", "triton", "numpy"))]
            venv.pip("install", *(alone or ["torch"]), "numpy", "pytest", "hypothesis")
            venv.pip("install", "--no-deps", wheel if environment.of == "wheel" else sdist)
            venv.copy_aside()
            venv.run(venv.python, "-c", ALONE, cwd=venv.aside)
            venv.pytest(*OPERATOR)
            venv.pip("install", *packages, *TOOLS, wheel if environment.of == "wheel" else sdist)
            venv.run(venv.python, "-m", "pip", "check")
            exporting = venv.run(venv.python, "-c", EXPORTING).strip() == "True"
            left_out = ("-k", f"not ({environment.left_out})") if environment.left_out else ()
            venv.pytest(*TESTS, *(EXPORTS if exporting else ()), *left_out)
            _call_command(venv, exporting)
            venv.run(venv.python, "-m", "pip", "uninstall", "--yes", "--quiet", "triton")
            venv.pytest(*WITHOUT_TRITON)
        return {"cases": 3}

    return check


def _call_command(venv: Venv, exporting: bool) -> None:
    """The command as it is installed: train, evaluate and export."""
    from tests.scorecard.commands import finetuning
    from tests.train.image_folder import write_images

    folder = venv.aside.parent
    images = write_images(folder / "images", {"train": 4, "val": 2})
    command, run = venv.bin / "stochca", folder / "run"
    venv.run(command, *finetuning(images, run))
    result = venv.run(command, "evaluate", run / "last.safetensors", "--data-dir", images, "--device", "cpu")
    assert "top-1" in result, result
    if exporting:
        venv.run(command, "export", run, "--output", folder / "export")
        code = f"import timm; timm.create_model('local-dir:{folder / 'export'}', pretrained=True)"
        venv.run(venv.python, "-c", code)


@functools.cache
def _releases() -> dict[str, tuple[str, str]]:
    """Every release that is installed with the project today, by its name in small letters."""
    wheel, _, _ = _distributions()
    with empty("3.13") as venv:
        report = venv.pip("install", "--dry-run", "--ignore-installed", "--report", "-", wheel)
    entries = [entry["metadata"] for entry in json.loads(report)["install"]]
    return {entry["name"].lower(): (entry["name"], entry["version"]) for entry in entries}


def _vulnerabilities(declared: bool) -> Callable[[], Figures]:
    """Of the dependencies that are declared, or of all others that are installed with them."""

    def check() -> Figures:
        wheel, _, _ = _distributions()
        names = {re.split(r"[\[=]", text)[0].lower() for text in distributions.oldest_of(wheel)}
        releases = {name: release for name, release in _releases().items() if name != "stochca"}
        assert names <= releases.keys(), f"{names - releases.keys()} are declared and not installed"
        asked = [release for name, release in releases.items() if (name in names) == declared]
        return {"cases": 1, "releases_looked_up": vulnerabilities.check(asked)}

    return check
