"""Every kernel under the tools of `compute-sanitizer`, on a GPU."""

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from typing import NamedTuple

from bench.digest import ROOT
from tests.scorecard.row import Case


class Tool(NamedTuple):
    """How a tool is run.

    Args:
        options: Of `compute-sanitizer`.
        clean: What it says last, where it has found nothing.
        environment: Variables of the program.
    """

    options: tuple[str, ...]
    clean: str
    environment: dict[str, str]


NOTHING = r"ERROR SUMMARY: 0 errors"
# Each tensor has memory of its own, with an end, and which nothing has written before.
OF_ITS_OWN = {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
# torch asks what a driver has, and takes no for an answer.
NO_API = ("--report-api-errors", "no")
TOOLS = {
    "memcheck": Tool(NO_API, NOTHING, OF_ITS_OWN),
    "initcheck": Tool(NO_API, NOTHING, OF_ITS_OWN),
    "synccheck": Tool((), NOTHING, {}),
    "racecheck": Tool(
        ("--racecheck-detect-level", "error"), r"RACECHECK SUMMARY: \d+ hazards? .*\(0 errors", {}
    ),
}


def gpu_cases(long: bool) -> Iterator[Case]:
    for tool in TOOLS if long else ("memcheck", "racecheck"):
        yield Case(tool, lambda tool=tool: _finds_nothing(tool))


def _finds_nothing(name: str) -> None:
    """Run the program under one tool.

    Raises:
        RuntimeError: The tool cannot be had here: nothing was measured.
    """
    from tests.gpu import sanitized

    sanitizer, tool = find_sanitizer(), TOOLS[name]
    sanitized.main()  # so that everything is compiled, and finite
    command = [sanitizer, "--tool", name, "--print-limit", "20", *tool.options]
    result = subprocess.run(
        [*command, sys.executable, "-m", "tests.gpu.sanitized"],
        cwd=ROOT,
        env={**os.environ, **tool.environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=600,
        check=False,
    )
    if "Device not supported" in result.stdout:
        raise RuntimeError("not measured: compute-sanitizer refuses this runtime, Device not supported")
    assert re.search(tool.clean, result.stdout), result.stdout[-8000:]
    assert str(sanitized.TOKENS) in result.stdout, f"it did not run to the end: {result.stdout[-8000:]}"
    assert result.returncode == 0, result.stdout[-8000:]


def find_sanitizer() -> str:
    """`compute-sanitizer` of the path or of the CUDA toolkit.

    Raises:
        RuntimeError: There is none.
    """
    homes = [os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH"), "/usr/local/cuda"]
    folders = [f"{home}/{folder}" for home in homes if home for folder in ("bin", "compute-sanitizer")]
    places = os.pathsep.join([os.environ.get("PATH", ""), *folders])
    found = shutil.which("compute-sanitizer", path=places)
    if found is None:
        raise RuntimeError("not measured: compute-sanitizer is neither on PATH nor in CUDA_HOME")
    return found
