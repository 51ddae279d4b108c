"""SWAD: the mean of all weights along the part of a run in which the validation loss stays low."""

from collections import deque
from collections.abc import Iterable, Mapping
from itertools import islice
from typing import Any, NamedTuple

import torch
from torch import Tensor

Weights = dict[str, Tensor]


class Segment(NamedTuple):
    """The steps between two evaluations.

    Args:
        start: The first step.
        end: The last, after which was evaluated.
        loss: That the evaluation found.
        mean: Of the weights after each step, float32 on the CPU.
    """

    start: int
    end: int
    loss: float
    mean: Weights


class Swad:
    r"""Dense stochastic weight averaging, aware of overfitting.

    The average begins with the first segment whose loss none of the `converge - 1` after it undercuts.
    The mean of these losses times `1 + tolerance_ratio` is the threshold. It ends before the first segment
    from which on `tolerance` segments have losses above the threshold.

    Args:
        converge: Segments.
        tolerance: Segments.
        tolerance_ratio: Share of the loss.

    Attributes:
        first_step: First step of the average, None before it has begun.

    Source: Cha, Chun, Lee, Cho, Park, Lee and Park, "SWAD: Domain Generalization by Seeking Flat Minima",
    NeurIPS 2021, the choice of the interval; written anew.
    """

    def __init__(self, converge: int = 3, tolerance: int = 6, tolerance_ratio: float = 0.3) -> None:
        self.converge, self.tolerance, self.tolerance_ratio = converge, tolerance, tolerance_ratio
        self.first_step: int | None = None
        self._threshold = 0.0
        self._is_over = False
        self._average = Segment(0, 0, 0.0, {})  # without a step
        self._waiting: deque[Segment] = deque()
        self._running: Weights = {}
        self._run = 0

    @torch.no_grad()
    def update(self, weights: Mapping[str, Tensor]) -> None:
        """Add the weights after a step to the segment at work."""
        if self._is_over:
            return
        self._run += 1
        if self._run == 1:
            self._running = {name: tensor.detach().float().clone() for name, tensor in weights.items()}
            return
        for name, mean in self._running.items():
            mean.lerp_(weights[name].detach().float(), 1 / self._run)

    def end_segment(self, step: int, loss: float) -> None:
        """Note the validation loss after a step, which ends a segment."""
        if self._is_over or not self._run:
            return
        mean = {name: tensor.cpu() for name, tensor in self._running.items()}
        self._waiting.append(Segment(step - self._run + 1, step, loss, mean))
        self._running, self._run = {}, 0
        if self.first_step is None:
            self._begin_where_converged()
        while self.first_step is not None and len(self._waiting) >= self.tolerance:
            if not self._is_low(self._waiting):
                self._is_over = True
                self._waiting.clear()
                return
            self._average = _joined(self._average, self._waiting.popleft())

    def result(self) -> Segment | None:
        """The average so far; None where the loss has not converged."""
        if self.first_step is None:
            return None
        average, waiting = self._average, self._waiting.copy()
        while waiting and self._is_low(waiting):
            average = _joined(average, waiting.popleft())
        return average

    def state(self) -> dict[str, Any]:
        """What `restore` takes: tensors, and Python's own types."""
        return {
            "first_step": self.first_step,
            "threshold": self._threshold,
            "is_over": self._is_over,
            "average": tuple(self._average),
            "waiting": [tuple(segment) for segment in self._waiting],
            "running": self._running,
            "run": self._run,
        }

    def restore(self, state: dict[str, Any], device: torch.device) -> None:
        """Go on from what `state` returned."""
        self.first_step, self._threshold = state["first_step"], state["threshold"]
        self._is_over, self._run = state["is_over"], state["run"]
        self._average = Segment(*state["average"])
        self._waiting = deque(Segment(*segment) for segment in state["waiting"])
        self._running = {name: tensor.to(device) for name, tensor in state["running"].items()}

    def _begin_where_converged(self) -> None:
        if len(self._waiting) < self.converge:
            return
        losses = [segment.loss for segment in self._waiting]
        if losses[0] > min(losses):
            self._waiting.popleft()
            return
        self.first_step = self._waiting[0].start
        self._threshold = (1 + self.tolerance_ratio) * sum(losses) / len(losses)

    def _is_low(self, segments: Iterable[Segment]) -> bool:
        """Whether one of the next `tolerance` losses is below the threshold."""
        return min(segment.loss for segment in islice(segments, self.tolerance)) <= self._threshold


def _joined(average: Segment, segment: Segment) -> Segment:
    """The mean over the steps of both, which follow one another."""
    if not average.mean:
        return segment
    share = (segment.end - segment.start + 1) / (segment.end - average.start + 1)
    mean = {name: tensor.lerp(segment.mean[name], share) for name, tensor in average.mean.items()}
    return Segment(average.start, segment.end, segment.loss, mean)
