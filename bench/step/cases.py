"""What is measured: which workload, under which p, in which precision, by whom."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch

from bench.step.providers import (
    BY_HAND_COMPILED,
    BY_HAND_EAGER,
    EXPERIMENTS,
    OURS,
    OURS_COMPILED,
    OURS_RECOMPUTING,
    PLAIN,
    PLAIN_COMPILED,
    PUBLISHED,
    PUBLISHED_AUTOCAST,
    PUBLISHED_TF32,
    SWITCHED_OFF,
)
from bench.step.workloads import (
    MAIN,
    OVER_B,
    OVER_DEPTH,
    OVER_N,
    REDUCED,
    REDUCED_OVER_B,
    REDUCED_OVER_DEPTH,
    REDUCED_OVER_N,
    SMALL_BATCH,
    TINY,
    VIT_B,
    VIT_B_448,
    VIT_S_CPU,
    Workload,
)

Study = Literal["main", "p", "N", "B", "depth", "ablation", "experiments"]

PROBABILITIES = (0.0, 0.1, 0.3, 0.5, 0.8)
EAGER = (PLAIN, BY_HAND_EAGER, OURS)
PUBLISHERS = (PUBLISHED, PUBLISHED_AUTOCAST)
COMPILED = (PLAIN_COMPILED, BY_HAND_COMPILED, OURS_COMPILED)
ALL = (*EAGER, OURS_RECOMPUTING, *PUBLISHERS, PUBLISHED_TF32, *COMPILED)  # TF32 is of GPUs
TRIED = (PLAIN, OURS, OURS_COMPILED, *(provider.name for provider in EXPERIMENTS))
ABLATION = (PLAIN, OURS, *(provider.name for provider in SWITCHED_OFF))


@dataclass(frozen=True)
class Case:
    """One table of the results.

    Args:
        workload: What is trained.
        p: Probability that a block reads the source.
        dtype: Precision of autocast.
        study: What it is part of.
        providers: Who runs it.
    """

    workload: Workload
    p: float
    dtype: torch.dtype
    study: Study = "main"
    providers: Sequence[str] = ALL

    @property
    def name(self) -> str:
        """As in `main vit_base_patch16_224-B128 bfloat16 p=0.1`."""
        return f"{self.study} {self.workload.name} {dtype_name(self.dtype)} p={self.p:g}"

    def record(self) -> dict[str, Any]:
        """What is known beforehand, as in the results."""
        return {"name": self.name, "study": self.study, "dtype": dtype_name(self.dtype), "p": self.p}


def dtype_name(dtype: torch.dtype) -> str:
    """As in `bfloat16`."""
    return str(dtype).removeprefix("torch.")


def gpu_cases() -> list[Case]:
    """Everything, cases of one workload together."""
    bf16 = torch.bfloat16
    cases = [
        *(Case(workload, p, bf16) for workload in MAIN for p in (0.1, 0.5)),
        *(Case(workload, 0.1, torch.float16) for workload in (VIT_B, VIT_B_448)),
        # p = 0.1 and 0.5 are above.
        *(
            Case(workload, p, bf16, "p", (*EAGER, *COMPILED))
            for workload in (VIT_B, VIT_B_448)
            for p in (0.0, 0.3, 0.8)
        ),
        *_growth(0.1, bf16, OVER_N, OVER_B, OVER_DEPTH),
        *(
            Case(workload, p, bf16, "ablation", ABLATION)
            for workload in (VIT_B, VIT_B_448)
            for p in (0.1, 0.5)
        ),
        *(Case(workload, 0.1, bf16, "experiments", TRIED) for workload in (VIT_B, VIT_B_448, SMALL_BATCH)),
    ]
    order = list(dict.fromkeys(case.workload.name for case in cases))
    return sorted(cases, key=lambda case: order.index(case.workload.name))


def quick_gpu_cases() -> list[Case]:
    """What the goals are about first, though the rest sets the smaller images up once more."""
    bf16 = torch.bfloat16
    who = [name for name in ALL if name != PUBLISHED_TF32]
    return [
        *(Case(workload, p, bf16, providers=who) for workload in (VIT_B, VIT_B_448) for p in (0.1, 0.5)),
        Case(VIT_B, 0.1, bf16, "ablation", ABLATION),
        Case(VIT_B, 0.0, bf16, "p", (*EAGER, *COMPILED)),
    ]


def cpu_cases() -> list[Case]:
    """The goal first; studies at a reduced size; compilation, which takes minutes, at a tiny one."""
    f32 = torch.float32
    return [
        Case(VIT_S_CPU, 0.1, f32, providers=(PLAIN, PUBLISHED, BY_HAND_EAGER, OURS)),
        *(Case(REDUCED, p, f32, "p", (PLAIN, PUBLISHED, BY_HAND_EAGER, OURS)) for p in PROBABILITIES),
        Case(REDUCED, 0.1, f32, "ablation", ABLATION),
        Case(REDUCED, 0.5, f32, "ablation", ABLATION),
        *(
            Case(workload, 0.1, f32, study, EAGER)
            for study, workloads in _studies(REDUCED_OVER_N, REDUCED_OVER_B, REDUCED_OVER_DEPTH)
            for workload in workloads
        ),
        Case(TINY, 0.5, f32, providers=(*EAGER, *COMPILED)),
    ]


def tiny_cases() -> list[Case]:
    """Seconds on a CPU: every provider that is not compiled, with and without autocast."""
    eager = (*EAGER, *PUBLISHERS)
    return [
        Case(TINY, 0.5, torch.bfloat16, providers=(*eager, OURS_RECOMPUTING)),
        Case(TINY, 0.0, torch.float32, "p", (*EAGER, PUBLISHED)),
        Case(TINY, 0.5, torch.float32, "ablation", ABLATION),
    ]


def _growth(p: float, dtype: torch.dtype, *over: Sequence[Workload]) -> Iterable[Case]:
    for study, workloads in _studies(*over):
        # Where B is small it matters how a step is launched.
        who = (*EAGER, *COMPILED) if study == "B" else (*EAGER, OURS_COMPILED, PLAIN_COMPILED)
        yield from (Case(workload, p, dtype, study, who) for workload in workloads)


def _studies(*over: Sequence[Workload]) -> Iterable[tuple[Study, Sequence[Workload]]]:
    """Workloads that grow in N, in B and in depth."""
    names: tuple[Study, ...] = ("N", "B", "depth")
    return zip(names, over, strict=True)
