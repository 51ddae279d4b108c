"""Batch spectral shrinkage: against features that do not transfer."""

import torch
from torch import Tensor

from stochca.losses.base import Companion, Step
from stochca.losses.checks import check_count, check_number
from stochca.model import StochCA


class BSS(Companion):
    r"""Penalise the smallest singular values of the features of a batch.

    :math:`\eta \sum_{i=1}^{k} \sigma_{-i}^2`, where :math:`\sigma_{-i}` is the i-th smallest singular value
    of F `[B, C]`, the pooled features of the batch. Squared singular values are eigenvalues of F F', whose
    gradient 2 u u' F is finite where they are zero or coincide.

    It is a property of one batch, not a mean over its samples: each process and each accumulated batch takes
    the singular values of its own images, and what is averaged is their terms.

    Args:
        model: Target and source.
        weight: :math:`\eta`.
        k: How many singular values, or all of them where a batch has fewer.

    Raises:
        ValueError: An option is out of range.

    Source: Chen, Wang, Fu, Long and Wang, NeurIPS 2019.
    """

    name = "bss"

    def __init__(self, model: StochCA, weight: float = 1e-3, k: int = 1) -> None:
        super().__init__()
        check_number(self.name, "weight", weight)
        check_count(self.name, "k", k)
        self.weight, self.k = weight, k

    def forward(self, step: Step) -> Tensor:
        """The term, see `Companion.forward`."""
        features = step.outputs.features
        # Squares lose the small beside the large. Autocast and TF32 leave float64 alone.
        f = features.double()
        gram = f @ f.T if f.shape[0] <= f.shape[1] else f.T @ f
        smallest = torch.linalg.eigvalsh(gram)[: self.k]
        return self.weight * smallest.sum().to(torch.promote_types(features.dtype, torch.float32))

    def extra_repr(self) -> str:
        """The options."""
        return f"weight={self.weight}, k={self.k}"
