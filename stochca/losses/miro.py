"""MIRO: keep the features informative about those of the pretrained model."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from stochca.losses.base import Companion, Step, exact
from stochca.losses.checks import check_number, resolve_taps
from stochca.model import StochCA

_EPSILON = 1e-5


class MIRO(Companion):
    r"""Bound the mutual information of the target's and the source's features from below.

    :math:`\lambda \sum_l \frac12 \mathrm{mean}\left((f_l - f^0_l)^2 / s^2_l + \log s^2_l\right)`, means over
    samples, tokens and channels, with a learned variance :math:`s^2_l = \mathrm{softplus}(b_l) + 10^{-5}` per
    channel.

    Args:
        model: Target and source.
        weight: :math:`\lambda`; the authors take 1 for CLIP's ViT, and 0.01 to 0.1 for a ResNet-50.
        taps: After how many blocks tokens are compared; None for those before the first block and after each
            quarter of the blocks.
        variance: Initial :math:`s^2`.
        lr_mult: Factor on the learning rate of :math:`b`.

    Attributes:
        b: One parameter `[C]` per tap, in their order.

    Raises:
        ValueError: An option is out of range, or a tap outside the model.

    Source: Cha, Lee, Park and Chun, ECCV 2022, arXiv 2203.10789.
    """

    name = "miro"

    def __init__(
        self,
        model: StochCA,
        weight: float = 1.0,
        taps: list[int] | None = None,
        variance: float = 0.1,
        lr_mult: float = 10.0,
    ) -> None:
        super().__init__()
        check_number(self.name, "weight", weight)
        check_number(self.name, "variance", variance, positive=True)
        check_number(self.name, "lr_mult", lr_mult)
        if variance <= _EPSILON:
            raise ValueError(f"{self.name}: variance must be above {_EPSILON}, got {variance}")
        self.weight, self.lr_mult = weight, float(lr_mult)
        self.taps = resolve_taps(self.name, taps, model)
        like = exact(next(model.target.parameters()).detach())
        initial = like.new_full((model.target.embed_dim,), _inverse_softplus(variance - _EPSILON))
        self.b = nn.ParameterList(initial.clone() for _ in self.taps)

    def forward(self, step: Step) -> Tensor:
        """The term, see `Companion.forward`."""
        terms = []
        for tap, b in zip(self.taps, self.b, strict=True):
            target, source = (exact(taps[tap]) for taps in (step.outputs.taps, step.outputs.source_taps))
            # [C], before anything is divided: a variance is of a channel.
            distance = F.mse_loss(target, source, reduction="none").mean((0, 1))
            variance = F.softplus(exact(b)) + _EPSILON
            terms.append((distance / variance + variance.log()).mean() / 2)
        return self.weight * torch.stack(terms).sum()

    def extra_repr(self) -> str:
        """The options."""
        return f"weight={self.weight}, taps={self.taps}, lr_mult={self.lr_mult}"


def _inverse_softplus(y: float) -> float:
    return y + math.log(-math.expm1(-y))
