"""The step on many ranks, expected over the coins, where they draw the same and where they do not.

Where every rank draws coins of its own, all wait for the slowest. Under DDP they wait once, at the end of a
step: its time is the expected maximum of the ranks' times. Under FSDP they wait at every stage: each takes
the expected maximum of its times, or somewhat less, since it was gathered a stage ahead. `simulate` plays
both out, rank by rank and stage by stage.
"""

from itertools import product

import numpy as np

from bench.cost import distribution
from bench.scaling.stages import OneGpu, Stages
from bench.scaling.timeline import Messages, Strategy, ddp


def expected_maximum(values: np.ndarray, chances: np.ndarray, count: int) -> float:
    """Expected maximum of `count` independent draws of one discrete law.

    Args:
        values: What can be drawn.
        chances: The probability of each.
        count: How many draws.
    """
    order = np.argsort(values)
    at_most = np.cumsum(chances[order]) ** count
    return float(values[order] @ np.diff(at_most, prepend=0.0))


def equal_coins(one: OneGpu, strategy: Strategy, messages: Messages) -> float:
    """Expected seconds of a step where all ranks draw the same."""
    ends, chances = _law(one, strategy, messages)
    return float(ends @ chances)


def independent_coins(one: OneGpu, strategy: Strategy, messages: Messages, ranks: int) -> float:
    """Expected seconds of a step where each rank draws for itself."""
    if strategy is ddp:
        return expected_maximum(*_law(one, strategy, messages), ranks)
    slowest = slowest_stages(one, ranks)
    return float(strategy(slowest, messages))


def slowest_stages(one: OneGpu, ranks: int) -> Stages:
    """Expected seconds `[1, L + 1]` of each stage on the slowest of so many ranks."""
    depth, p = one.size.depth, one.p
    forward, backward = np.zeros((1, depth + 1)), np.zeros((1, depth + 1))
    for block in range(depth):
        coins, chances = _cases(depth, block, p)
        stages = one.stages(coins)
        for slowest, times in ((forward, stages.forward), (backward, stages.backward)):
            slowest[0, block + 1] = expected_maximum(times[:, block + 1], chances, ranks)
    any_source = 1 - (1 - p) ** depth
    ends = one.stages(np.array([[False] * depth, [True] * depth]))
    forward[0, 0] = expected_maximum(ends.forward[:, 0], np.array([1 - any_source, any_source]), ranks)
    backward[0, 0] = ends.backward[0, 0]
    return Stages(forward, backward, ends.rest)


def simulate(
    one: OneGpu, strategy: Strategy, messages: Messages, ranks: int, trials: int, seed: int = 0
) -> tuple[float, float]:
    """Draw coins for every rank and play the step: mean seconds of all trials, and its standard error."""
    generator = np.random.default_rng(seed)
    coins = generator.random((trials, ranks, one.size.depth)) < one.p
    ends = strategy(one.stages(coins), messages)
    return float(ends.mean()), float(ends.std() / np.sqrt(trials))


def _law(one: OneGpu, strategy: Strategy, messages: Messages) -> tuple[np.ndarray, np.ndarray]:
    """When a step of equal coins ends under each class of draws, and the probability of each class."""
    draws, chances = zip(*distribution(one.size.depth, one.p), strict=True)
    return strategy(one.stages(np.array(draws)[:, None]), messages), np.array(chances)


def _cases(depth: int, block: int, p: float) -> tuple[np.ndarray, np.ndarray]:
    """Draws for each way in which a block can run, and their probabilities.

    A block's time depends on its own coin, and on whether all blocks after it read the source, none, or some.
    """
    after = depth - 1 - block
    ends = {(True,) * after: p**after}
    if after:
        ends[(False,) * after] = (1 - p) ** after
    if after > 1:
        ends[(True,) + (False,) * (after - 1)] = 1 - p**after - (1 - p) ** after
    cases = [
        ((False,) * block + (coin,) + end, (p if coin else 1 - p) * chance)
        for coin, (end, chance) in product((False, True), ends.items())
    ]
    coins, chances = zip(*cases, strict=True)
    return np.array(coins), np.array(chances)
