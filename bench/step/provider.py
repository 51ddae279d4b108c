"""Somebody who runs the step of a workload."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import torch

from bench.cost import ALL_SAVINGS, Savings
from bench.step.check import ALLOWED
from bench.step.training import Forward, TrainingStep
from bench.step.workloads import Setting


@dataclass(frozen=True)
class Provider:
    """Somebody who runs a step.

    Args:
        name: As in the results.
        build: From a setting to the forward; called once for all cases of the setting.
        savings: What of the work it leaves out, by which its FLOPs are counted; None for plain fine-tuning,
            which never reads the source and knows no coin.
        precision: Of its arithmetic; None for the case's.
        compiled: Compiled, and compared with those of ours that are.
        step: How a step is run.
        graphed: Replays CUDA graphs, whose memory the allocator does not count as taken.
        holds_source: The weights of the source are held in the dtype of autocast, not cast in every step.
        tf32: Products in float32 are products of TF32, on a GPU.
        allowed: How many times the error of the eager rival written by hand is allowed.
    """

    name: str
    build: Callable[[Setting], Forward]
    savings: Savings | None = ALL_SAVINGS
    precision: torch.dtype | None = None
    compiled: bool = False
    step: Callable[..., TrainingStep] = TrainingStep
    graphed: bool = False
    holds_source: bool = True
    tf32: bool = False
    allowed: Mapping[str, float] = field(default_factory=lambda: ALLOWED)

    @property
    def reads_source(self) -> bool:
        """Whether the source takes memory, and coins say what is computed."""
        return self.savings is not None

    @property
    def is_eager(self) -> bool:
        """Whether operators run one by one, so that what they keep for the backward can be seen."""
        return not (self.compiled or self.graphed)

    def coins(self, drawn: Sequence[bool]) -> tuple[bool, ...]:
        """What its step computes where these coins are drawn: plain fine-tuning reads no source."""
        return tuple(coin and self.reads_source for coin in drawn)

    def precision_in(self, dtype: torch.dtype) -> torch.dtype:
        """Precision of its arithmetic in a case of one dtype."""
        return self.precision or dtype
