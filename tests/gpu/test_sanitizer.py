"""Every kernel under `compute-sanitizer`: no access outside a tensor, no race in shared memory."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from stochca_kernels import backward, backward_joint, forward, projected, tokens
from tests.gpu import sanitized
from tests.gpu.paths import DEVICE, gpu

ROOT = Path(__file__).parents[2]
# What a tool says last, where it has found nothing.
CLEAN = {"memcheck": r"ERROR SUMMARY: 0 errors", "racecheck": r"RACECHECK SUMMARY: \d+ hazards? .*\(0 errors"}


def find_sanitizer() -> str | None:
    """`compute-sanitizer` of the path or of the CUDA toolkit."""
    homes = [os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH"), "/usr/local/cuda"]
    folders = [f"{home}/{folder}" for home in homes if home for folder in ("bin", "compute-sanitizer")]
    return shutil.which("compute-sanitizer", path=os.pathsep.join([os.environ.get("PATH", ""), *folders]))


@pytest.mark.skipif(DEVICE == "cuda", reason="some kernels are for some GPUs alone")
@pytest.mark.filterwarnings("ignore:(overflow|invalid value|divide by zero) encountered")
def test_the_program_launches_every_kernel(monkeypatch):
    launched = set()

    class Spy:
        def __init__(self, name, kernel):
            self.name, self.kernel = name, kernel

        def __getitem__(self, grid):
            launched.add(self.name)
            return self.kernel[grid]

    kernels = set()
    for module in (forward, backward, backward_joint, projected, tokens):
        for name in [name for name in vars(module) if name.endswith("_kernel")]:
            monkeypatch.setattr(module, name, Spy(name, getattr(module, name)))
            kernels.add(name)
    monkeypatch.setattr(tokens, "token_splits", lambda *_: 3)  # of a GPU's
    sanitized.main()
    assert len(kernels) == 9
    assert launched == kernels


@pytest.mark.parametrize("tool", CLEAN)
@gpu[0]
@gpu[1]
def test_sanitizer_finds_nothing(tool):
    program = find_sanitizer()
    if program is None:
        pytest.skip("compute-sanitizer is neither on PATH nor in CUDA_HOME")
    sanitized.main()  # so that everything is compiled, and finite
    options = ["--tool", tool, "--print-limit", "20"]
    environment = os.environ.copy()
    if tool == "memcheck":
        options += ["--report-api-errors", "no"]  # torch asks what a driver has, and takes no for an answer
        environment["PYTORCH_NO_CUDA_MEMORY_CACHING"] = "1"  # each tensor has an end of its own
    else:
        options += ["--racecheck-detect-level", "error"]
    result = subprocess.run(
        [program, *options, sys.executable, "-m", "tests.gpu.sanitized"],
        cwd=ROOT,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=90,
        check=False,
    )
    if "Device not supported" in result.stdout:
        pytest.skip("compute-sanitizer refuses this runtime: Device not supported")
    assert re.search(CLEAN[tool], result.stdout), result.stdout[-8000:]
    assert str(sanitized.TOKENS) in result.stdout  # it ran to the end
    assert result.returncode == 0, result.stdout[-8000:]
