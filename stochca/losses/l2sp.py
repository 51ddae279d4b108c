"""L2-SP: weight decay towards the pretrained weights."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from stochca.losses.base import Companion, Step, exact
from stochca.losses.checks import check_number, classifier_of
from stochca.model import StochCA


class L2SP(Companion):
    r"""Penalise the squared distance of the backbone to the source, and the squared norm of the classifier.

    :math:`\frac{\alpha}{2} \lVert w - w^0 \rVert^2 + \frac{\beta}{2} \lVert w_{head} \rVert^2`, sums over all
    parameters, biases and norms included.

    Weights that the source will hold in less than their precision, see `source_dtype` of `StochCA`, are
    copied here before. The copies follow `.to()` and are in no state dict: a resumed run makes them again of
    the pretrained source.

    Args:
        model: Target and source.
        weight: :math:`\alpha`.
        head_weight: :math:`\beta`.

    Raises:
        ValueError: An option is out of range, the target has not one classifier, or a parameter of its
            backbone has no counterpart of its shape and precision in the source.

    Source: Li, Grandvalet and Davoine, ICML 2018.
    """

    name = "l2_sp"

    def __init__(self, model: StochCA, weight: float = 0.01, head_weight: float = 0.01) -> None:
        super().__init__()
        check_number(self.name, "weight", weight)
        check_number(self.name, "head_weight", head_weight)
        self.weight, self.head_weight = weight, head_weight
        head = {id(p) for p in classifier_of(self.name, model, "target").parameters()}
        self._head = frozenset(name for name, p in model.target.named_parameters() if id(p) in head)
        self._check_source(model)
        # No buffers: they would be saved, or sent to all processes in every step.
        self._copies = {}
        if model.source_dtype not in (None, "float32"):
            self._copies = {
                f"{prefix}.{name}": p.detach().clone()
                for prefix, module in model.source.named_modules()
                if isinstance(module, nn.Linear | nn.Conv2d)  # what `hold_weights` casts
                for name, p in module.named_parameters(recurse=False)
                if f"{prefix}.{name}" not in self._head
            }

    def forward(self, step: Step) -> Tensor:
        """The term, see `Companion.forward`."""
        source = dict(step.model.source.named_parameters()) | self._copies
        backbone, head = [], []
        for name, p in step.model.target.named_parameters():
            if name in self._head:
                head.append(exact(p).square().sum())
            else:  # keeps no difference for the backward, but both weights, which exist anyway
                backbone.append(F.mse_loss(exact(p), exact(source[name]), reduction="sum"))
        return (self.weight * torch.stack(backbone).sum() + self.head_weight * torch.stack(head).sum()) / 2

    def extra_repr(self) -> str:
        """The options."""
        return f"weight={self.weight}, head_weight={self.head_weight}"

    def _check_source(self, model: StochCA) -> None:
        source = dict(model.source.named_parameters())
        for name, p in model.target.named_parameters():
            wanted = f"{tuple(p.shape)} in {p.dtype}"
            other = source.get(name)
            got = "none" if other is None else f"{tuple(other.shape)} in {other.dtype}"
            if name not in self._head and got != wanted:
                raise ValueError(f"{self.name} needs a source whose {name} is {wanted}, got {got}")

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "L2SP":
        super()._apply(fn, recurse)
        self._copies = {name: fn(copy) for name, copy in self._copies.items()}
        return self
