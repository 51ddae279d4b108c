"""What every kernel needs on every GPU, read from programs compiled ahead of time without one."""

import itertools
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")

ROOT = Path(__file__).parents[2]
# One name or two per kernel, GPU and arithmetic; `python -m tests.kernels.compile_all` compiles everything.
SUBSET = "|".join(
    (
        "bf16-N197-D(64|80|128)-selector",
        "sm_90-bf16-N197-D(64|128)$",
        "fp32-ieee-N197-D(64|128)-selector",
        "sm_(80|120)-fp32-tf32-N197-D128-selector",
    )
)


@pytest.fixture(scope="module")
def reports():
    # Another process: in this one the kernels may be interpreted.
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "tests.kernels.compile_all", "--json", "--only", SUBSET]
    result = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    return [json.loads(line) for line in result.stdout.splitlines()]


def test_every_kernel_gpu_and_arithmetic_is_among_the_programs(reports):
    cases = {tuple(report["case"].split("-")[:3]) for report in reports}
    kernels, gpus = ("fwd", "dq", "dkdv"), ("sm_80", "sm_90", "sm_100", "sm_120", "gfx942")
    assert cases == set(itertools.product(kernels, gpus, ("bf16", "fp32")))


def test_nothing_spills(reports):
    assert {r["case"]: r["spills"] for r in reports if r["spills"] > 0} == {}


def test_shared_memory_is_under_the_limit(reports):
    assert {r["case"]: r["shared"] for r in reports if r["shared"] > r["shared_limit"]} == {}


def test_hopper_runs_its_own_matrix_instructions_on_16_bit_inputs(reports):
    counts = {r["case"]: r["wgmma"] for r in reports if "sm_90-bf16" in r["case"]}
    assert len(counts) >= 9
    assert min(counts.values()) > 0, counts


def test_loads_are_vectorized(reports):
    counts = {r["case"]: r["vector_loads"] for r in reports if "sm_" in r["case"]}
    assert min(counts.values()) > 0, counts
