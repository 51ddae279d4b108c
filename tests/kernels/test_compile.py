"""What every kernel needs on every GPU, read from programs compiled ahead of time without one.

`bench/results/programs.json` has all of them, which take ten minutes. A share is compiled again here: each
kernel, each arithmetic, both makers of GPUs, and the least shared memory.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")

import triton

from bench.programs import all_programs, one_per_row
from stochca_kernels import tiles

ROOT = Path(__file__).parents[2]
RECORDED = json.loads((ROOT / "bench" / "results" / "programs.json").read_text())
KEYS = {
    "attn_fwd": "fwd",
    "attn_bwd_dq": "dq",
    "attn_bwd_dkdv": "dkdv",
    "attn_bwd_joint": "dqkv",
    "projected_fwd": "projected_fwd",
    "projected_dq": "projected_dq",
    "tokens_fwd": "tokens_fwd",
    "tokens_bwd": "tokens_bwd",
}


COMPILED = (
    "(sm_90-bf16|sm_120-tf32|gfx942-ieee)-.*-(D64|C1280)"
    "|(attn_bwd_dkdv|projected_fwd)-(sm_120-tf32|gfx942-ieee)-.*-D128"
)


@pytest.fixture(scope="module")
def compiled(tmp_path_factory):
    # Another process: in this one the kernels may be interpreted.
    output = tmp_path_factory.mktemp("programs") / "programs.json"
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "bench.programs", "--only", COMPILED, "--output", str(output)]
    result = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    return json.loads(output.read_text())["programs"]


@pytest.fixture(scope="module")
def reports(compiled):
    return [*RECORDED["programs"], *compiled]


@pytest.fixture(scope="module")
def aside():
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-W", "ignore", "-m", "tests.kernels.more_programs"]
    result = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    return json.loads(result.stdout)


def test_heads_that_16_does_not_divide_are_loaded_as_vectors_and_spill_nothing(aside):
    assert len(aside["heads"]) > 0
    assert {r["name"]: r["spills"] for r in aside["heads"] if r["spills"] > 0} == {}
    assert min(r["vector_loads"] for r in aside["heads"]) > 0


def test_tokens_of_any_width_have_a_row_that_fits(aside):
    for reports in aside["widths"].values():
        assert {r["name"].split("-")[0] for r in reports} == {"tokens_fwd", "tokens_bwd"}
        for report in reports:
            assert report["spills"] == 0
            assert report["shared"] <= report["shared_limit"]


def test_the_batch_compiles_no_other_program_of_few_rows(aside):
    # With 132 multiprocessors from 1 to 13 programs share the tokens of a sample.
    kernels = {key for launched in aside["launched"] for key in map(tuple, launched)}
    names = sorted(name for name, _ in kernels)
    assert names == ["sum_splits", "sum_splits", "tokens_bwd", "tokens_fwd"]


def test_what_is_launched_is_recorded():
    recorded = [program["name"] for program in RECORDED["programs"]]
    assert sorted(program.name for program in one_per_row(all_programs())) == sorted(recorded)


def test_every_row_of_the_table_is_among_the_programs():
    cuts = set()
    for report in RECORDED["programs"]:
        kernel, gpu, arithmetic, row = report["name"].split("-")[:4]
        arithmetic = "half" if arithmetic in ("bf16", "fp16") else arithmetic
        name = "nvidia" if arithmetic != "half" and gpu != "gfx942" else gpu
        block_m, _, block_n = row.partition("x")
        cut = (int(block_m), 0 if block_n == "all" else int(block_n), report["warps"], report["stages"])
        cuts.add((KEYS[kernel], name, arithmetic, *cut))
    table = {(*key, *row[:4]) for key, columns in tiles._TABLE.items() for rows in columns for row in rows}
    assert table - cuts == set()
    parts = {report["name"].split("-")[1] for report in RECORDED["programs"]}
    assert parts == {"sm_80", "sm_89", "sm_90", "sm_100", "sm_120", "gfx942"}


def test_nothing_spills(reports):
    assert {r["name"]: r["spills"] for r in reports if r["spills"] > 0} == {}


def test_no_program_was_compiled_to_nothing(reports):
    assert {r["name"]: r["registers"] for r in reports if r["registers"] < 32} == {}


def test_shared_memory_is_under_the_limit(reports):
    assert {r["name"]: r["shared"] for r in reports if r["shared"] > r["shared_limit"]} == {}


def test_hopper_runs_its_own_matrix_instructions_on_16_bit_inputs(reports):
    # The kernels of few rows have 16 of them, and its instruction takes 64.
    counts = {
        r["name"]: r["wgmma"] for r in reports if "-sm_90-bf16-" in r["name"] and "tokens" not in r["name"]
    }
    assert len(counts) >= 15
    assert min(counts.values()) > 0, counts


def test_loads_are_vectorized(reports):
    counts = {r["name"]: r["vector_loads"] for r in reports if "-sm_" in r["name"]}
    assert min(counts.values()) > 0, counts


@pytest.mark.skipif(
    triton.__version__ != RECORDED["versions"]["triton"], reason="recorded with another version of Triton"
)
def test_figures_are_as_recorded(compiled):
    recorded = {program["name"]: program for program in RECORDED["programs"]}
    assert {r["name"].split("-")[0] for r in compiled} == set(KEYS)
    assert {r["name"]: r for r in compiled} == {r["name"]: recorded.get(r["name"]) for r in compiled}
