"""Keys and values that do not exist yet: the tokens, and the weight that would project them."""

from typing import NamedTuple, TypeAlias

from torch import Tensor
from torch.nn import functional as F


class Projection(NamedTuple):
    r"""Stands for heads of tokens :math:`r\,(x W') + b`, to be computed, or avoided, by the operator.

    Args:
        x: Tokens `[B, N, C]`, usually after the block's first norm.
        weight: For keys and values packed `[2 * H * D, C]`: the rows of all key heads, then those of all
            value heads. For queries `[H * D, C]`.
        bias: `[2 * H * D]` or `[H * D]`, or None.
        rstd: A factor of each token, float32 `[B, N]`, or None for one. A layer norm before a frozen
            projection folds into it: with its gain multiplied into `weight`, each row of `weight` then
            centred, its bias mapped into `bias`, and `rstd` the tokens' inverse standard deviation, `x`
            are the tokens before the norm.
    """

    x: Tensor
    weight: Tensor
    bias: Tensor | None = None
    rstd: Tensor | None = None


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


def unpack(qkv: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Queries, keys and values `[B, H, N, D]`, three views of a packed projection `[B, N, 3, H, D]`."""
    q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)
    return q, k, v


def project(projection: Projection, num_heads: int, parts: int = 2) -> tuple[Tensor, ...]:
    """Compute keys and values, or queries (one part): views `[B, H, N, D]` of one packed product."""
    x, weight, bias, rstd = projection
    if rstd is None:
        packed = F.linear(x, weight, bias)
    else:
        packed = (F.linear(x, weight) * rstd[..., None]).to(x.dtype)
        packed = packed if bias is None else packed + bias
    return packed.unflatten(-1, (parts, num_heads, -1)).permute(2, 0, 3, 1, 4).unbind(0)


def pair_of(side: KV, num_heads: int) -> tuple[Tensor, Tensor]:
    """Keys and values `[B, H, N, D]` of one side, computed where they are a `Projection`."""
    assert side is not None
    if isinstance(side, Projection):
        k, v = project(side, num_heads)
        return k, v
    return side
