"""What a training step should take on one H200 in bf16: predictions by arithmetic, not measurements.

`python -m bench.step_predictions` prints them: the step of everybody on every workload, the goals of the
step, and what one product for target and source would save where batches are small. `bench.step_times`
holds the assumptions, `python3 -m bench.step` measures.
"""

import sys
from collections.abc import Callable, Sequence
from functools import cache
from math import ceil
from typing import Any

from bench.cost import Draw, Size, representative_draws
from bench.sizes import size_of, title
from bench.step import providers
from bench.step.cases import Case
from bench.step.goals import MEMORY, TIME, gpu_goals, judge
from bench.step.workloads import MAIN, Workload
from bench.step.workloads import VIT_B as VIT_B_224
from bench.step_times import (
    AUTHORS,
    AUTHORS_BF16,
    HAND,
    HAND_EAGER,
    OURS,
    OURS_EAGER,
    OURS_FP8,
    OURS_RECOMPUTING,
    PLAIN,
    PLAIN_EAGER,
    PROVIDERS,
    Provider,
    expected_seconds,
    peak_bytes,
)

PROBABILITIES = (0.0, 0.1, 0.3, 0.5, 0.8)
# How many draws stand for all, as in `python3 -m bench.step --quick`.
NUM_DRAWS = 8
# Rows and columns of the output that one program of a large product computes, and programs at a time.
GEMM_TILE = (128, 256)
MULTIPROCESSORS = 132


def seconds(workload: Workload, provider: Provider, p: float) -> float:
    """Predicted time of a step, mean over the coins."""
    return expected_seconds(size_of(workload), workload.batch, provider, p)


def peak(workload: Workload, provider: Provider, p: float) -> float:
    """Predicted peak memory in bytes without frozen weights, at the most over the draws of `bench.step`."""
    size, batch = size_of(workload), workload.batch
    return max(peak_bytes(size, batch, provider, coins) for coins in _draws(size, p))


@cache
def _draws(size: Size, p: float) -> list[Draw]:
    return representative_draws(size, p, NUM_DRAWS)


Ratio = Callable[[Workload, float], float]


def _times(of: Provider, to: Provider) -> Ratio:
    return lambda workload, p: seconds(workload, of, p) / seconds(workload, to, p)


def _peaks(of: Provider, to: Provider) -> Ratio:
    return lambda workload, p: peak(workload, of, p) / peak(workload, to, p)


RATIOS: dict[str, Ratio] = {
    "ours / plain, eager": _times(OURS_EAGER, PLAIN_EAGER),
    "ours / plain": _times(OURS, PLAIN),
    "ours / by hand": _times(OURS, HAND),
    "authors fp32 / ours, eager": _times(AUTHORS, OURS_EAGER),
    "authors bf16 / ours, eager": _times(AUTHORS_BF16, OURS_EAGER),
    "ours, fp8 source / plain": _times(OURS_FP8, PLAIN),
    "peak memory ours / plain, eager": _peaks(OURS_EAGER, PLAIN_EAGER),
    "with recomputation": _peaks(OURS_RECOMPUTING, PLAIN_EAGER),
}
"""Ratios of the table, compiled to compiled where nothing else is said; memory at the most over draws."""

HEADER = ["workload, predicted", "p", *(f"{provider.name}, ms" for provider in PROVIDERS), *RATIOS]


def rows(
    workloads: Sequence[Workload] = MAIN, probabilities: Sequence[float] = PROBABILITIES
) -> list[list[str]]:
    """Predicted steps: everybody's mean time over the coins, and ratios."""
    return [
        [
            title(workload),
            f"{p:g}",
            *(f"{1e3 * seconds(workload, provider, p):.1f}" for provider in PROVIDERS),
            *(f"{ratio(workload, p):.2f}" for ratio in RATIOS.values()),
        ]
        for workload in workloads
        for p in probabilities
    ]


# Those of `bench.step` that the goals are about.
PREDICTED = {
    providers.PLAIN: PLAIN_EAGER,
    providers.PLAIN_COMPILED: PLAIN,
    providers.PUBLISHED: AUTHORS,
    providers.PUBLISHED_AUTOCAST: AUTHORS_BF16,
    providers.BY_HAND_EAGER: HAND_EAGER,
    providers.BY_HAND_COMPILED: HAND,
    providers.OURS: OURS_EAGER,
    providers.OURS_RECOMPUTING: OURS_RECOMPUTING,
    providers.OURS_COMPILED: OURS,
}


def predicted() -> dict[str, Any]:
    """What `bench.step` would record if predictions were measurements: "cases", and "goals" as it judges."""
    goals = gpu_goals()
    cases = {goal.case.name: goal.case for goal in goals}
    recorded = [predicted_case(case) for case in cases.values()]
    return {"cases": recorded, "goals": judge(goals, recorded)}


def predicted_case(case: Case) -> dict[str, Any]:
    """A case as `bench.step` would record it, as far as the goals look at it."""
    entries = {
        name: {
            TIME: 1e3 * seconds(case.workload, PREDICTED[name], case.p),
            MEMORY: peak(case.workload, PREDICTED[name], case.p) / 2**20,
        }
        for name in case.providers
        if name in PREDICTED
    }
    return {**case.record(), "workload": case.workload.record(), "providers": entries}


GOAL_HEADER = ["goal", "case", "goal is", "predicted"]


def goal_rows() -> list[list[str]]:
    """Each goal in each of its cases: its bound, and the predicted ratio with its verdict."""
    return [
        [
            goal["goal"],
            goal["case"],
            f"<= {goal['at_most']:.2f}" if "at_most" in goal else f">= {goal['at_least']:.2f}",
            f"{goal['value']:.3f} {goal['verdict']}",
        ]
        for goal in predicted()["goals"]
    ]


SMALL_BATCHES = (4, 8, 16, 32, 64, 128)
SMALL_BATCH_HEADER = ["product, ViT-B/16 at 224", *(f"B={batch}" for batch in SMALL_BATCHES)]


def small_batch_rows() -> list[list[str]]:
    """Time of one launch for the products of target and source over that of two, where whole waves count."""
    size = size_of(VIT_B_224)
    shapes = {
        "q, k, v": (size.width, 3 * size.attention_width),
        "output": (size.attention_width, size.width),
        "MLP, in": (size.width, size.mlp_hidden),
        "MLP, out": (size.mlp_hidden, size.width),
    }

    def time(shape: tuple[int, int], batch: int, products: int) -> int:
        inner, columns = shape
        tiles = ceil(batch * size.length / GEMM_TILE[0]) * ceil(columns / GEMM_TILE[1])
        return ceil(products * tiles / MULTIPROCESSORS) * inner

    groups = {**{name: [shape] for name, shape in shapes.items()}, "all four": list(shapes.values())}
    return [
        [
            name,
            *(
                f"{sum(time(s, batch, 2) for s in group) / sum(2 * time(s, batch, 1) for s in group):.2f}"
                for batch in SMALL_BATCHES
            ),
        ]
        for name, group in groups.items()
    ]


def main() -> None:
    """Print the tables."""
    sys.stdout.write("Predictions for one H200, bf16, optimizer included; nothing here was measured.\n\n")
    for header, lines in (
        (HEADER, rows()),
        (GOAL_HEADER, goal_rows()),
        (SMALL_BATCH_HEADER, small_batch_rows()),
    ):
        table = [header, *lines]
        widths = [max(map(len, column)) for column in zip(*table, strict=True)]
        for first, *others in table:
            fields = [f"{field:>{width}}" for field, width in zip(others, widths[1:], strict=True)]
            sys.stdout.write("  ".join([f"{first:{widths[0]}}", *fields]) + "\n")
        sys.stdout.write("\n")


if __name__ == "__main__":
    main()
