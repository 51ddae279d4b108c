"""Timing: providers take turns on the same draws, and who is first changes.

Two intervals of each step are taken: with the optimizer, and up to it. On a GPU a turn is all draws without
waiting in between, as in training, and times are between events on the device. On the CPU a turn is one
draw, so that a machine that becomes slower for a while does so to everybody.
"""

import math
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from statistics import fmean, median, pstdev
from typing import Any

import torch

from bench.kernels.clock import percentiles
from bench.step.training import TrainingStep

Coins = tuple[bool, ...]


class Deadline:
    """A number of seconds from now on.

    Args:
        seconds: None for no end.
    """

    def __init__(self, seconds: float | None = None) -> None:
        self._end = math.inf if seconds is None else time.perf_counter() + seconds

    def passed(self, seconds: float = 0.0) -> bool:
        """Whether they will be over in some seconds."""
        return time.perf_counter() + seconds > self._end


@dataclass
class Times:
    """Milliseconds of steps, by draw.

    Args:
        whole: With the optimizer.
        without_optimizer: Forward and backward alone.
        rounds: All steps with the optimizer, by round.
    """

    whole: dict[Coins, list[float]] = field(default_factory=dict)
    without_optimizer: dict[Coins, list[float]] = field(default_factory=dict)
    rounds: list[list[float]] = field(default_factory=list)

    def add(self, draw: Coins, whole: float, without_optimizer: float) -> None:
        """Record one step."""
        self.whole.setdefault(draw, []).append(whole)
        self.without_optimizer.setdefault(draw, []).append(without_optimizer)
        self.rounds[-1].append(whole)

    def summary(self, draws: Sequence[Coins], batch: int) -> dict[str, Any]:
        """As in the results, for a set of draws that stand for all."""
        whole = summarize(self.whole, draws)
        return {
            **whole,
            "round_mean_ms": [fmean(steps) for steps in self.rounds if steps],
            "steps": sum(map(len, self.whole.values())),
            "images_per_s": 1e3 * batch / whole["mean_ms"],
            "without_optimizer": summarize(self.without_optimizer, draws),
        }


def summarize(times: Mapping[Coins, Sequence[float]], draws: Sequence[Coins]) -> dict[str, float]:
    """Percentiles of all steps; then mean and standard deviation over the draws of their medians."""
    percent = percentiles([ms for of_draw in times.values() for ms in of_draw])
    medians = [median(times[draw]) for draw in draws]
    return {
        **{name.replace("_us", "_ms"): value for name, value in percent.items()},
        "mean_ms": fmean(medians),
        "spread_ms": pstdev(medians),
    }


def time_rounds(
    steps: Mapping[str, TrainingStep],
    draws: Sequence[Coins],
    rounds: int,
    device: torch.device,
    deadline: Deadline,
    failed: Callable[[str, Exception], bool],
    verify: Callable[[], None] = lambda: None,
) -> dict[str, Times]:
    """Time every provider on every draw once in each round.

    Args:
        steps: By provider.
        draws: Coins of all blocks, several times over.
        rounds: As many as the deadline leaves time for, one at least.
        device: Where.
        deadline: When to stop.
        failed: Called with what a provider raised, which has no more turns; returns whether all have to stop.
        verify: Called after each turn; what it raises is the provider's failure.
    """
    taken = {name: Times() for name in steps}
    turns = deque(steps)
    order = deque(draws)
    length = len(draws) if device.type == "cuda" else 1
    for i in range(rounds):
        if i and deadline.passed():
            break
        for times in taken.values():
            times.rounds.append([])
        for begin in range(0, len(draws), length):
            for name in list(turns):
                try:
                    _turn(steps[name], list(order)[begin : begin + length], device, taken[name])
                    verify()
                except Exception as error:  # a provider that fails stops nobody else
                    turns.remove(name)
                    del taken[name]
                    if failed(name, error):
                        return _begun(taken)
            turns.rotate(-1)
        order.rotate(-1)  # the first draw of a turn finds an idle device
    return _begun(taken)


def _begun(taken: Mapping[str, Times]) -> dict[str, Times]:
    """Those who have run."""
    return {name: times for name, times in taken.items() if times.whole}


def _turn(step: TrainingStep, draws: Sequence[Coins], device: torch.device, times: Times) -> None:
    """Run some draws one after the other, and record their times."""
    stamps = []
    _wait(device)
    for draw in draws:
        begin = _stamp(device)
        step.forward_backward(draw)
        middle = _stamp(device)
        step.update()
        stamps.append((draw, begin, middle, _stamp(device)))
    _wait(device)
    for draw, begin, middle, end in stamps:
        times.add(draw, _milliseconds(begin, end), _milliseconds(begin, middle))


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


def _stamp(device: torch.device) -> Any:
    if device.type != "cuda":
        return time.perf_counter()
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event


def _milliseconds(begin: Any, end: Any) -> float:
    if isinstance(begin, float):
        return 1e3 * (end - begin)
    return begin.elapsed_time(end)
