"""What the operator has to reach, and whether it does."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from bench.kernels.measure import Case
from bench.kernels.paths import (
    CLASS_ROW_CROSS,
    CLASS_ROW_SELF,
    CROSS,
    CROSS_WITH_SOURCE,
    PROJECTION_WITH_SOURCE,
    SELF,
)
from bench.kernels.shapes import MAIN, VIT_B_224, VIT_B_448, VIT_L_14


@dataclass(frozen=True)
class Goal:
    """A ratio to the fastest rival that all of some cases have to reach.

    Args:
        text: What is to be reached.
        at_least: The ratio.
        cases: Where; the smallest ratio counts.
    """

    text: str
    at_least: float
    cases: Sequence[Case]


GOALS = (
    Goal(
        "forward, N=197 and 257",
        1.3,
        [Case(SELF, "forward", shape) for shape in (VIT_B_224, VIT_L_14)],
    ),
    Goal("forward, N=785", 1.1, [Case(SELF, "forward", VIT_B_448)]),
    Goal(
        "target + source queries, one launch, N=197, over two calls",
        1.5,
        [Case(CROSS_WITH_SOURCE, "forward", VIT_B_224)],
    ),
    Goal("backward of cross-attention (dQ only)", 1.8, [Case(CROSS, "backward", shape) for shape in MAIN]),
    Goal(
        "backward of self-attention, N=197 and 257",
        1.15,
        [Case(SELF, "backward", shape) for shape in (VIT_B_224, VIT_L_14)],
    ),
    Goal(
        "class row without K, V, N=197 and 785, forward + backward, over product + attention",
        4.0,
        [
            Case(path, "forward+backward", shape)
            for path in (CLASS_ROW_SELF, CLASS_ROW_CROSS)
            for shape in (VIT_B_224, VIT_B_448)
        ],
    ),
    Goal(
        "projection + attention, all rows, N=197, over product + best attention",
        1.0,
        [Case(PROJECTION_WITH_SOURCE, which, VIT_B_224) for which in PROJECTION_WITH_SOURCE.passes],
    ),
)


def judge(goals: Iterable[Goal], measured: Iterable[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Each goal with its ratios: reached, missed, or not measured where not every ratio is there."""
    ratios = {case["name"]: case.get("ratio") for case in measured}
    judged = []
    for goal in goals:
        found = {case.name: ratios.get(case.name) for case in goal.cases}
        known = [ratio for ratio in found.values() if ratio is not None]
        verdict = "not measured"
        if known and min(known) < goal.at_least:
            verdict = "missed"
        elif len(known) == len(found):
            verdict = "reached"
        judged.append(
            {
                "goal": goal.text,
                "at_least": goal.at_least,
                "ratio": min(known, default=None),
                "verdict": verdict,
                "cases": found,
            }
        )
    return judged
