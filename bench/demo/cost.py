"""What a step of each variant costs: by the clock, and counted."""

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

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
    """Cost of every variant, on one core.

    Args:
        variants: Those to measure, relative to the first.
        source: The pretrained model.
        images: The first `recipe.batch_size` of them are the batch.
        recipe: How many steps are timed, and how a step goes.
    """
    batch = images.take(torch.arange(recipe.batch_size))
    times = step_times(variants, source, batch, recipe)
    plain = variants[0]
    plain_flops, plain_bytes = counts(plain, source, batch.pixels)
    costs = {}
    for variant in variants:
        p20, p50, p80 = np.quantile(times[variant], (0.2, 0.5, 0.8)).tolist()
        flops, kept = counts(variant, source, batch.pixels)
        ratio = p50 / float(np.median(times[plain]))
        costs[variant] = Cost(p20, p50, p80, ratio, flops / plain_flops, kept / plain_bytes)
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


def counts(variant: Variant, source: nn.Module, pixels: Tensor) -> tuple[float, float]:
    """FLOPs of a step and bytes it keeps for the backward, expected over the coins.

    FLOPs are counted on the meta device: torch's counter does not know the attention of the CPU.
    """
    _, model = prepare(variant, source, seed=0)
    model.train()
    frozen = model.source.parameters() if isinstance(model, StochCA) else ()
    parameters = [*model.parameters(), *frozen]

    def forward(images: Tensor, coins: Sequence[bool]) -> Tensor:
        return model(images, coins=coins) if isinstance(model, StochCA) else model(images)

    def expected(count: Callable[[Sequence[bool]], int]) -> float:
        [(mean, _)] = relative_costs(ARCHITECTURE["depth"], count, 1, [variant.p or 0.0])
        return mean

    kept = expected(lambda coins: saved_bytes(lambda: forward(pixels, coins), parameters))
    model.to("meta")
    return expected(lambda coins: step_flops(lambda: forward(pixels.to("meta"), coins))), kept
