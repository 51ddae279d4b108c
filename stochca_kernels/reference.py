"""The definition of the operator, in the shortest eager code: every other implementation is tested by it."""

import math

import torch
from torch import Tensor
from torch.nn import functional as F

from stochca_kernels.projection import KV, Projection


def attend(q: Tensor, k: Tensor, v: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """Softmax attention and the base-2 log-sum-exp of its scores.

    Args:
        q: Queries `[B, H, Nq, D]`.
        k: Keys `[B, H, N, D]`.
        v: Values `[B, H, N, D]`.
        scale: Factor on the scores `q k'`.

    Returns:
        The output `[B, H, Nq, D]` and `log2(sum(exp(scores)))` of shape `[B, H, Nq]`.
    """
    scores = q @ k.transpose(-2, -1) * scale
    return scores.softmax(-1) @ v, scores.logsumexp(-1) / math.log(2)


def attention_reference(
    q: Tensor,
    kv: KV,
    source_kv: KV,
    use_source: bool | Tensor,
    source_q: Tensor | Projection | None,
    scale: float,
) -> tuple[Tensor, Tensor | None]:
    """Attend with each sample's queries to its own pair, or to the source's where its coin says so."""

    def heads(side: Projection) -> Tensor:
        tokens = side.x if side.rstd is None else (side.x * side.rstd[..., None]).to(side.x.dtype)
        return (
            F.linear(tokens, side.weight, side.bias)
            .unflatten(-1, (-1, q.shape[1], q.shape[3]))
            .permute(2, 0, 3, 1, 4)
        )

    def pair(side: KV) -> tuple[Tensor, Tensor]:
        assert side is not None
        if isinstance(side, Projection):
            k, v = heads(side)
            return k, v
        return side

    if isinstance(source_q, Projection):
        source_q = heads(source_q)[0]
    source_out = None if source_q is None else attend(source_q, *pair(source_kv), scale)[0]
    if isinstance(use_source, bool):
        return attend(q, *pair(source_kv if use_source else kv), scale)[0], source_out
    if isinstance(kv, Projection):  # the weight's gradient is a sum over samples, and 0 * NaN is NaN
        kv = kv._replace(x=torch.where(use_source[:, None, None], 0, kv.x))
    own, source = pair(kv), pair(source_kv)
    out = q.clone()  # of an empty batch too, so that gradients reach it
    for b, coin in enumerate(use_source.tolist()):
        k, v = source if coin else own
        out = out.index_copy(0, torch.tensor([b], device=q.device), attend(q[b], k[b], v[b], scale)[0][None])
    return out, source_out
