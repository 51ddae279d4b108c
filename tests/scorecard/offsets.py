"""Offsets beyond 2^31 elements: proved of the code of every kernel, and run on a GPU that holds so many."""

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator

from bench.digest import ROOT
from tests.scorecard.intervals import overflows
from tests.scorecard.row import Case, Figures

KERNELS = (
    "attn_fwd", "attn_bwd_dq", "attn_bwd_dkdv", "attn_bwd_joint", "projected_fwd", "projected_dq",
    "tokens_fwd", "tokens_bwd", "sum_splits",
)  # fmt: skip
# Not every GPU has a row of the table for each kernel, nor float32 for those of few rows.
PARTS = [
    (gpu, arithmetic)
    for gpu in ("sm_80", "sm_89", "sm_90", "sm_100", "sm_120")
    for arithmetic in ("bf16", "ieee")
]


def cases(long: bool) -> Iterator[Case]:
    if not long:
        yield Case("sm_90 bf16", _proof("sm_90", "bf16", every=False))
        return
    for gpu, arithmetic in PARTS:
        yield Case(f"{gpu} {arithmetic}", _proof(gpu, arithmetic, every=True))


def _proof(gpu: str, arithmetic: str, every: bool) -> Callable[[], Figures]:
    def check() -> Figures:
        programs = code_of_kernels(gpu, arithmetic, every)
        kernels = {name.split("-")[0] for name in programs}
        if (gpu, arithmetic) == ("sm_90", "bf16"):
            assert kernels == set(KERNELS), f"there is no code of {set(KERNELS) - kernels}"
        followed = 0
        for name, code in programs.items():
            report = overflows(code)
            assert report.wide > 0, f"{name}: no offset of 64 bits among {report.offsets}"
            assert not report.marks, f"{name} may overflow in {report.marks}"
            followed += report.offsets
        return {"cases": len(kernels), "programs_of_a_part": len(programs), "offsets_of_a_part": followed}

    return check


def code_of_kernels(gpu: str, arithmetic: str, every: bool) -> dict[str, str]:
    """Triton's code by the name of each program, from a process in which nothing is interpreted."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-W", "ignore", "-m", "tests.scorecard.ttir", gpu, arithmetic]
    result = subprocess.run(
        command + ["--every"] * every, cwd=ROOT, env=environment, capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stderr
    programs: dict[str, str] = json.loads(result.stdout)
    return programs


def gpu_cases(long: bool) -> Iterator[Case]:
    from tests.gpu.large import GIB, assert_last_samples_as_alone

    for path in GIB:
        yield Case(path, lambda path=path: assert_last_samples_as_alone(path))
