"""One fault that is planted, and whether a test notices it."""

import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parents[2]
ALWAYS = ("-x", "-q", "-p", "no:cacheprovider", "--hypothesis-seed=0", "-W", "ignore:Module already imported")
# What of other projects the tests import
PRELOADED = (
    "hypothesis",
    "numpy",
    "PIL.Image",
    "pytest",
    "safetensors.torch",
    "timm",
    "torch._dynamo",
    "torch.distributed",
    "torchvision",
    "triton.language",
    "triton.runtime.interpreter",
)


class Mutant(NamedTuple):
    name: str
    file: str
    old: str
    new: str
    tests: tuple[str, ...]


class Workshop:
    """A copy of the tree in which faults are planted one after another, and the process that tests it.

    Args:
        limit: Seconds of processor time after which tests count as failed: a fault may be an endless loop.
        preloaded: Modules that the process imports before it tests anything.

    Attributes:
        seconds: Of processor time, that the last tests took.
    """

    def __init__(self, limit: float = 150.0, preloaded: tuple[str, ...] = PRELOADED) -> None:
        self._limit = limit
        self.seconds = 0.0
        self._folder = tempfile.TemporaryDirectory()
        self.tree = Path(self._folder.name).resolve() / "tree"
        ignored = shutil.ignore_patterns(".*", "__pycache__", "*.egg-info", "runs", "build")
        shutil.copytree(ROOT, self.tree, ignore=ignored)
        environment = {key: value for key, value in os.environ.items() if not key.startswith("PYTEST")}
        self._server = subprocess.Popen(
            [sys.executable, str(Path(__file__).with_name("preloaded.py")), *preloaded],
            cwd=self.tree,
            env={**environment, "PYTHONPATH": ""},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def __enter__(self) -> "Workshop":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        self._server.communicate()
        self._folder.cleanup()

    def noticed(self, mutant: Mutant) -> str | None:
        """The test that fails where the fault is planted, or how its process ended; None where all pass."""
        path = self.tree / mutant.file
        text = path.read_text()
        if text.count(mutant.old) != 1:
            raise ValueError(
                f"{mutant.name}: the old text is {text.count(mutant.old)} times in {mutant.file}"
            )
        before = path.stat()
        try:
            path.write_text(text.replace(mutant.old, mutant.new))
            # Of another second than any before: bytecode is compiled anew.
            os.utime(path, (before.st_atime, before.st_mtime + 10))
            return self.failure(mutant.tests)
        finally:
            path.write_text(text)
            os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
            for compiled in path.parent.glob(f"__pycache__/{path.stem}.*.pyc"):
                compiled.unlink()

    def failure(self, tests: tuple[str, ...]) -> str | None:
        """The first test that fails in the tree as it lies, or how the process ended; None where all pass."""
        request = {"folder": str(self.tree), "arguments": [*ALWAYS, *tests], "limit": self._limit}
        self._server.stdin.write(json.dumps(request) + "\n")
        self._server.stdin.flush()
        answer = json.loads(self._server.stdout.readline())
        code, output = answer["code"], answer["output"]
        self.seconds = answer["seconds"]
        if code is None:
            return f"not ended after {self._limit:.0f} s"
        if code < 0:
            return f"ended by signal {-code}"
        if code > 1:  # neither passed, nor failed: no verdict
            raise RuntimeError(f"pytest could not run {' '.join(tests)}\n{output}")
        if code == 0:
            return None
        failed = re.search(r"^(?:FAILED|ERROR) (\S+)", output, flags=re.MULTILINE)
        return failed[1] if failed else output
