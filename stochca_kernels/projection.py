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


def zero_where(side: KV, coin: Tensor) -> KV:
    """One side with zeros in the samples whose coin `[B]` is true.

    What is not selected is replaced before anything is computed from it, not after: a NaN there would come
    back as 0 * NaN in a backward.
    """
    assert side is not None
    if isinstance(side, Projection):
        return side._replace(x=side.x.masked_fill(coin[:, None, None], 0))
    k, v = (t.masked_fill(coin[:, None, None, None], 0) for t in side)
    return k, v


def unpack(qkv: Tensor) -> tuple[Tensor, ...]:
    """Queries, keys and values `[B, H, N, D]`, three views of a packed projection `[B, N, 3, H, D]`."""
    return qkv.permute(2, 0, 3, 1, 4).unbind(0)


def project(projection: Projection, num_heads: int) -> tuple[Tensor, Tensor]:
    """Compute keys and values, two views `[B, H, N, D]` of one packed `[B, N, 2, H, D]` product."""
    packed = F.linear(*projection).unflatten(-1, (2, num_heads, -1))
    k, v = packed.permute(2, 0, 3, 1, 4).unbind(0)
    return k, v
