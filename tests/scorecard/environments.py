"""Empty environments of Python, into which only wheels are installed."""

import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from bench.digest import ROOT
from tests.scorecard.row import NotMeasuredError

TOOLS = ("hypothesis", "pytest", "scikit-learn")


def interpreter(version: str) -> Path:
    """The executable of "3.10", of pyenv or on the path."""
    found = sorted(Path.home().glob(f".pyenv/versions/{version}.*/bin/python"))
    name = str(found[-1]) if found else shutil.which(f"python{version}")
    if name is None:
        raise NotMeasuredError(f"there is no Python {version} here")
    return Path(name)


class Venv:
    """An environment with a copy of the tests and benchmarks beside it, and of nothing that is installed.

    Args:
        folder: Where both lie.
        version: Of Python.
        options: What every installation is given.
    """

    def __init__(self, folder: Path, version: str, options: Sequence[str] = ()) -> None:
        self.bin = folder / "venv" / "bin"
        self.python = self.bin / "python"
        self.aside = folder / "aside"
        self._options = options
        # The newest release is the newest one, whatever the pip of this machine is held to.
        kept = {k: v for k, v in os.environ.items() if not k.startswith(("PYTHON", "PYTEST", "VIRTUAL_ENV"))}
        self._environment = {**kept, "PIP_CONSTRAINT": os.devnull, "PIP_DISABLE_PIP_VERSION_CHECK": "1"}
        self.run(interpreter(version), "-m", "venv", folder / "venv")
        self.pip("install", "--upgrade", "pip")

    def run(self, *command: str | Path, cwd: Path | None = None) -> str:
        """Standard output of a command, which has to succeed."""
        done = subprocess.run(
            [str(part) for part in command],
            cwd=cwd or self.bin.parent.parent,
            env=self._environment,
            capture_output=True,
            text=True,
            check=False,
        )
        said = done.stdout[-6000:] + done.stderr[-6000:]
        assert done.returncode == 0, f"{' '.join(map(str, command))} ended with {done.returncode}: {said}"
        return done.stdout

    def pip(self, command: str, *arguments: str | Path) -> str:
        options = ["--quiet", "--only-binary", ":all:", *self._options] if command == "install" else []
        return self.run(self.python, "-m", "pip", command, *options, *arguments)

    def copy_aside(self) -> None:
        """The tree without the packages: what is imported from there is what is installed."""
        left_out = ("stochca", "stochca_kernels", "runs", "build", "*.egg-info", "__pycache__", ".*")
        shutil.copytree(ROOT, self.aside, ignore=shutil.ignore_patterns(*left_out))
        code = "import sys, stochca_kernels as k; assert k.__file__.startswith(sys.prefix), k.__file__"
        self.run(self.python, "-c", code, cwd=self.aside)

    def pytest(self, *arguments: str) -> None:
        self.run(self.python, "-m", "pytest", "-q", "-p", "no:cacheprovider", *arguments, cwd=self.aside)


@contextmanager
def empty(version: str, options: Sequence[str] = ()) -> Iterator[Venv]:
    """One that is gone afterwards: it takes 6 GB."""
    with tempfile.TemporaryDirectory() as folder:
        yield Venv(Path(folder).resolve(), version, options)
