"""Keys and values that do not exist yet: the tokens, and the weight that would project them."""

from typing import NamedTuple, TypeAlias

from torch import Tensor
from torch.nn import functional as F


class Projection(NamedTuple):
    """Stands for the keys and values `x @ weight.T + bias`, to be computed, or avoided, by the operator.

    Args:
        x: Tokens `[B, N, C]`, usually after the block's first norm.
        weight: Packed `[2 * H * D, C]`: the rows of all key heads, then those of all value heads.
        bias: Packed `[2 * H * D]`, or None.
    """

    x: Tensor
    weight: Tensor
    bias: Tensor | None = None


KV: TypeAlias = tuple[Tensor, Tensor] | Projection | None
"""One side of the operator: a pair `(k, v)` of `[B, H, N, D]`, a `Projection`, or None where unused."""


def project(projection: Projection, num_heads: int) -> tuple[Tensor, Tensor]:
    """Compute keys and values, two views `[B, H, N, D]` of one packed `[B, N, 2, H, D]` product."""
    packed = F.linear(*projection).unflatten(-1, (2, num_heads, -1))
    k, v = packed.permute(2, 0, 3, 1, 4).unbind(0)
    return k, v
