"""What a step of each variant costs: by the clock, and counted."""

import copy
import functools
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from tqdm import tqdm

from bench.counts import relative_costs, saved_bytes, step_flops
from bench.demo.digits import Images
from bench.demo.training import ARCHITECTURE, Recipe, Variant, prepare, train
from stochca import StochCA

WARMUP = 5


@dataclass(frozen=True)
class Cost:
    """Cost of a training step.

    Args:
        p20: Milliseconds, 20th percentile.
        p50: Median.
        p80: 80th percentile.
        time: Median relative to plain fine-tuning.
        flops: FLOPs of forward and backward relative to plain fine-tuning, expected over the coins.
        saved_bytes: So for the bytes that the forward keeps for the backward.
    """

    p20: float
    p50: float
    p80: float
    time: float
    flops: float
    saved_bytes: float


def measure(
    variants: Sequence[Variant], source: nn.Module, images: Images, recipe: Recipe
) -> dict[Variant, Cost]:
    """Cost of a step of every variant, on one core.

    Args:
        variants: Those to measure, relative to the first.
        source: The pretrained model.
        images: The first `recipe.batch_size` of them are the batch.
        recipe: How many steps are timed, and how a step goes.
    """
    batch = images.take(torch.arange(recipe.batch_size))
    times = step_times(variants, source, batch, recipe)
    counts = relative_counts(variants, source, batch.pixels)
    plain_time = float(np.median(times[variants[0]]))
    costs = {}
    for variant in variants:
        p20, p50, p80 = np.quantile(times[variant], (0.2, 0.5, 0.8)).tolist()
        costs[variant] = Cost(p20, p50, p80, p50 / plain_time, *counts[variant])
    return costs


def step_times(
    variants: Sequence[Variant], source: nn.Module, batch: Images, recipe: Recipe
) -> dict[Variant, list[float]]:
    """Milliseconds of whole training steps, the variants taking turns so that all meet the same machine."""

    def batches() -> Iterator[tuple[Tensor, Tensor]]:
        return ((batch.pixels, batch.labels) for _ in range(recipe.steps))

    steppers = {v: train(prepare(v, source, seed=0)[1], batches(), recipe) for v in variants}
    times: dict[Variant, list[float]] = {variant: [] for variant in steppers}
    for _ in tqdm(range(recipe.steps), "time steps", unit="round"):
        for variant, stepper in steppers.items():
            start = time.perf_counter()
            next(stepper)
            times[variant].append((time.perf_counter() - start) * 1e3)
    return {variant: ms[WARMUP:] for variant, ms in times.items()}


def relative_counts(
    variants: Sequence[Variant], source: nn.Module, pixels: Tensor
) -> dict[Variant, tuple[float, float]]:
    """FLOPs of a step and bytes it keeps for the backward, expected over the coins, relative to the first."""
    models = {variant: prepare(variant, source, seed=0)[1].train() for variant in variants}
    plain_flops, plain_bytes = count(models[variants[0]], pixels)
    counts: dict[Variant, tuple[float, float]] = {}
    for variant, model in models.items():
        if variant.p is None:
            step = count(model, pixels)
            counts[variant] = (step[0] / plain_flops, step[1] / plain_bytes)

    ours = [variant for variant in variants if variant.p is not None]

    @functools.cache  # what a draw costs does not depend on how likely it is
    def of_draw(coins: Sequence[bool]) -> tuple[int, int]:
        return count(models[ours[0]], pixels, coins=coins)

    probabilities = [variant.p for variant in ours if variant.p is not None]
    depth = ARCHITECTURE["depth"]
    flops_of = relative_costs(depth, lambda coins: of_draw(coins)[0], plain_flops, probabilities)
    bytes_of = relative_costs(depth, lambda coins: of_draw(coins)[1], plain_bytes, probabilities)
    for variant, (flops, _), (kept, _) in zip(ours, flops_of, bytes_of, strict=True):
        counts[variant] = (flops, kept)
    return counts


def count(model: nn.Module, pixels: Tensor, **options: Any) -> tuple[int, int]:
    """FLOPs of a step and bytes its forward keeps; options go to `model.forward`.

    FLOPs are counted on the meta device: torch's counter does not know the attention of the CPU.
    """
    frozen = model.source.parameters() if isinstance(model, StochCA) else ()
    kept = saved_bytes(lambda: model(pixels, **options), [*model.parameters(), *frozen])
    on_meta = copy.deepcopy(model).to("meta")
    return step_flops(lambda: on_meta(pixels.to("meta"), **options)), kept
