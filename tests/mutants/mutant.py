"""One fault that is planted, and whether a test notices it."""

import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parents[2]


class Mutant(NamedTuple):
    name: str
    file: str
    old: str
    new: str
    tests: tuple[str, ...]


def survives(mutant: Mutant) -> bool:
    """Run the tests of one mutant in a copy of the tree. Passing tests mean that nothing noticed."""
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder) / "tree"
        shutil.copytree(ROOT, copy, ignore=shutil.ignore_patterns(".*", "__pycache__", "*.egg-info"))
        path = copy / mutant.file
        text = path.read_text()
        if text.count(mutant.old) != 1:
            raise SystemExit(
                f"{mutant.name}: the old text is {text.count(mutant.old)} times in {mutant.file}"
            )
        path.write_text(text.replace(mutant.old, mutant.new))
        command = [sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider", *mutant.tests]
        result = subprocess.run(command, cwd=copy, capture_output=True, text=True, check=False)
    if result.returncode > 1:  # neither passed, nor failed, nor killed by a signal: no verdict
        raise SystemExit(f"{mutant.name}: pytest could not run\n{result.stdout}{result.stderr}")
    return result.returncode == 0
