"""What a step has to reach, and whether it does."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from bench.step.cases import Case
from bench.step.providers import (
    BY_HAND_COMPILED,
    OURS,
    OURS_COMPILED,
    OURS_RECOMPUTING,
    PLAIN,
    PLAIN_COMPILED,
    PUBLISHED,
    PUBLISHED_AUTOCAST,
)
from bench.step.workloads import VIT_B, VIT_B_448, VIT_S_CPU

TIME, MEMORY = "mean_ms", "peak_mib_without_frozen"
ROUNDS = "round_mean_ms"


@dataclass(frozen=True)
class Goal:
    """A bound on the ratio of two providers in one case.

    Args:
        text: What is to be reached.
        case: Where.
        above: Whose figure is divided.
        below: By whose.
        figure: What is compared.
        at_most: The bound, or None.
        at_least: The bound, where there is no other.
    """

    text: str
    case: Case
    above: str
    below: str
    figure: str = TIME
    at_most: float | None = None
    at_least: float | None = None

    def judge(self, measured: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
        """The goal with its value: reached, missed, or not measured. Times have an interval over the rounds.

        Args:
            measured: Cases by name.
        """
        entries = measured.get(self.case.name, {}).get("providers", {})
        above, below = (entries.get(name, {}).get(self.figure) for name in (self.above, self.below))
        value = None if above is None or below is None else above / below
        bound = {"at_most": self.at_most} if self.at_most is not None else {"at_least": self.at_least}
        low, high = _interval(*(entries.get(name, {}).get(ROUNDS) for name in (self.above, self.below)))
        return {
            "goal": self.text,
            **bound,
            "value": value,
            **({"low": low, "high": high} if self.figure == TIME else {}),
            "verdict": self._verdict(value),
            "case": self.case.name,
        }

    def _verdict(self, value: float | None) -> str:
        if value is None:
            return "not measured"
        reached = value <= self.at_most if self.at_most is not None else value >= (self.at_least or 0.0)
        return "reached" if reached else "missed"


def _interval(
    above: Sequence[float] | None, below: Sequence[float] | None
) -> tuple[float, float] | tuple[None, None]:
    """20th and 80th percentile of the ratio over the rounds that both have run."""
    if not above or not below:
        return None, None
    ratios = [a / b for a, b in zip(above, below, strict=False)]
    low, high = np.quantile(ratios, (0.2, 0.8)).tolist()
    return low, high


def judge(goals: Iterable[Goal], cases: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Each goal with what was measured."""
    measured = {case["name"]: case for case in cases}
    return [goal.judge(measured) for goal in goals]


def cpu_goals() -> list[Goal]:
    """ViT-S/16, float32."""
    case = Case(VIT_S_CPU, 0.1, torch.float32)
    return [
        Goal("time over plain fine-tuning", case, OURS, PLAIN, at_most=1.10),
        Goal("time over the authors' computation", case, OURS, PUBLISHED, at_most=0.80),
    ]


def gpu_goals() -> list[Goal]:
    """One H200, bfloat16: ViT-B/16 at 224, and at 448 the same."""
    return [
        goal
        for workload in (VIT_B, VIT_B_448)
        for p in (0.1, 0.5)
        for goal in _gpu_goals(Case(workload, p, torch.bfloat16))
    ]


def _gpu_goals(case: Case) -> list[Goal]:
    return [
        Goal("time over plain fine-tuning, both eager", case, OURS, PLAIN, at_most=1.00),
        Goal("time over plain fine-tuning, both compiled", case, OURS_COMPILED, PLAIN_COMPILED, at_most=1.05),
        Goal("time over StochCA by hand, both compiled", case, OURS_COMPILED, BY_HAND_COMPILED, at_most=0.80),
        Goal("time of the authors' computation as published over ours", case, PUBLISHED, OURS, at_least=10.0),
        Goal(
            "time of the authors' computation under autocast over ours",
            case,
            PUBLISHED_AUTOCAST,
            OURS,
            at_least=2.5,
        ),
        *(
            Goal(
                f"peak memory without frozen weights over plain fine-tuning{how}",
                case,
                ours,
                PLAIN,
                MEMORY,
                at_most=0.90,
            )
            for ours, how in ((OURS, ""), (OURS_RECOMPUTING, ", with recomputation"))
        ),
    ]
