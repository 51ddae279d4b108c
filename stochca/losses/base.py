"""What a loss beside cross-entropy is: a term of a step, and what it reads of target and source."""

from typing import NamedTuple

import torch
from torch import Tensor, nn

from stochca.model import StepOutputs, StochCA


class Step(NamedTuple):
    """What a step hands to its losses.

    Args:
        model: Target and source.
        outputs: Of `StochCA.forward_step`, with the taps and source logits that any loss asked for.
        labels: Class indices `[B]`, or shares of the classes `[B, num_classes]` where labels are mixed.
    """

    model: StochCA
    outputs: StepOutputs
    labels: Tensor


class Companion(nn.Module):
    """A loss that is added to cross-entropy. It is its own kind of module: it may hold parameters.

    Its state dict is saved with a run's state, never with the target.

    Attributes:
        name: By which options name it.
        taps: After how many blocks it reads the tokens of both models, see `StochCA.forward_step`.
        reads_source_logits: Whether it reads the logits of the source, which then has its pretrained head.
        fits_source_logits: Whether `fit` is to be called before the first step of a run, not where a state
            dict is loaded. The source has its pretrained head then, too.
        lr_mult: Factor on the learning rate of its own parameters.
    """

    name: str
    taps: tuple[int, ...] = ()
    reads_source_logits: bool = False
    fits_source_logits: bool = False
    lr_mult: float = 1.0

    def forward(self, step: Step) -> Tensor:
        """The term, a scalar in float32 (float64 for a model in it) that includes its weight."""
        raise NotImplementedError

    def fit(self, source_logits: Tensor, labels: Tensor) -> None:
        """Learn from the training images, before the first step, what the term needs of them.

        Args:
            source_logits: Of all training images without augmentation, `[n, classes of the source]`.
            labels: Their classes `[n]`.
        """


def exact(x: Tensor) -> Tensor:
    """The tensor in float32, in which terms are computed; float64 stays what it is."""
    return x.to(torch.promote_types(x.dtype, torch.float32))
