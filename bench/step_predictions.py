"""What a training step should take on one H200 in bf16: predictions by arithmetic, not measurements.

`python -m bench.step_predictions` prints them: the step of everybody on every workload, the goals of the
step, and what one product for target and source would save where batches are small. `bench.step_times`
holds the assumptions, `python3 -m bench.step` measures.
"""

import sys
from collections.abc import Callable, Sequence
from functools import cache
from math import ceil
from typing import Any, NamedTuple

import timm
import torch

from bench.cost import Size, expectation
from bench.step.workloads import MAIN, NUM_CLASSES, VIT_B_448, Workload
from bench.step.workloads import VIT_B as VIT_B_224
from bench.step_times import (
    AUTHORS,
    AUTHORS_BF16,
    HAND,
    OURS,
    OURS_EAGER,
    OURS_FP8,
    PLAIN,
    PLAIN_EAGER,
    PROVIDERS,
    Provider,
    expected_seconds,
    peak_bytes,
)

PROBABILITIES = (0.0, 0.1, 0.3, 0.5, 0.8)
# Rows and columns of the output that one program of a large product computes, and programs at a time.
GEMM_TILE = (128, 256)
MULTIPROCESSORS = 132


def title(workload: Workload) -> str:
    """As in the tables."""
    return f"{workload.title}, B={workload.batch}"


def size_of(workload: Workload) -> Size:
    """Sizes of the model."""
    return _size(workload.model, workload.image_size, tuple(sorted(workload.kwargs.items())))


@cache
def _size(model: str, image_size: int | None, kwargs: tuple[tuple[str, Any], ...]) -> Size:
    options = {} if image_size is None else {"img_size": image_size}
    with torch.device("meta"):
        return Size.of(timm.create_model(model, num_classes=NUM_CLASSES, **options, **dict(kwargs)))


def seconds(workload: Workload, provider: Provider, p: float) -> float:
    """Predicted time of a step, mean over the coins."""
    return expected_seconds(size_of(workload), workload.batch, provider, p)


def peak(workload: Workload, provider: Provider, p: float) -> float:
    """Predicted peak memory in bytes without frozen weights, mean over the coins."""
    size, batch = size_of(workload), workload.batch
    return expectation(lambda coins: peak_bytes(size, batch, provider, coins), size.depth, p)


Ratio = Callable[[Workload, float], float]


def _times(of: Provider, to: Provider) -> Ratio:
    return lambda workload, p: seconds(workload, of, p) / seconds(workload, to, p)


RATIOS: dict[str, Ratio] = {
    "ours / plain, eager": _times(OURS_EAGER, PLAIN_EAGER),
    "ours / plain": _times(OURS, PLAIN),
    "ours / by hand": _times(OURS, HAND),
    "authors fp32 / ours": _times(AUTHORS, OURS),
    "authors bf16 / ours": _times(AUTHORS_BF16, OURS),
    "ours, fp8 source / plain": _times(OURS_FP8, PLAIN),
    "peak memory ours / plain": lambda workload, p: peak(workload, OURS, p) / peak(workload, PLAIN, p),
}
"""Ratios of the table, compiled to compiled where nothing else is said."""

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


class Goal(NamedTuple):
    """A bound on a ratio.

    Args:
        text: What is to be reached.
        ratio: One of `RATIOS`.
        bound: The ratio.
        at_most: It is an upper bound, otherwise a lower one.
    """

    text: str
    ratio: str
    bound: float
    at_most: bool = True


GOALS = (
    Goal("step time of plain fine-tuning, eager", "ours / plain, eager", 1.00),
    Goal("step time of plain fine-tuning, compiled", "ours / plain", 1.05),
    Goal("step time of StochCA by hand, compiled", "ours / by hand", 0.80),
    Goal("speed-up over the authors' computation as published, fp32", "authors fp32 / ours", 10.0, False),
    Goal("speed-up over the authors' computation in bf16", "authors bf16 / ours", 2.5, False),
    Goal(
        "peak memory of plain fine-tuning, compiled, without frozen weights", "peak memory ours / plain", 0.90
    ),
)
GOAL_HEADER = ["goal", "workload", "p=0.1", "p=0.5", "goal is", "would be"]


def goal_rows() -> list[list[str]]:
    """Each goal where it is to be reached: predicted ratios, and what the worse of them would be."""
    lines = []
    for goal in GOALS:
        for workload in (VIT_B_224, VIT_B_448):
            ratios = [RATIOS[goal.ratio](workload, p) for p in (0.1, 0.5)]
            reached = max(ratios) <= goal.bound if goal.at_most else min(ratios) >= goal.bound
            lines.append(
                [
                    goal.text,
                    title(workload),
                    *(f"{ratio:.3f}" for ratio in ratios),
                    f"{'<=' if goal.at_most else '>='} {goal.bound:.2f}",
                    "reached" if reached else "missed",
                ]
            )
    return lines


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
