"""Attention of few rows of queries without a key or a value, as an operator that torch differentiates.

By associativity `q (x W_k')' = (q W_k) x'` and `P (x W_v' + b_v) = (P x) W_v' + b_v`, since the rows of `P`
sum to one; the key bias shifts a whole row of scores and cancels. The outer products are small and left to
torch.
"""

import torch
from torch import Tensor

import stochca_kernels.ops  # noqa: F401, registers torch.ops.stochca
from stochca_kernels.autograd import refuse_functorch, refuse_second_derivative
from stochca_kernels.projection import KV, Projection


class _Tokens(torch.autograd.Function):
    @staticmethod
    def forward(ctx, queries, x, rstd, source_x, source_rstd, use_source, scale):
        sides = (x, rstd, source_x, source_rstd, use_source)
        mixed, lse = torch.ops.stochca.tokens_forward(queries, *sides, scale)
        ctx.save_for_backward(queries, *sides, mixed, lse)
        ctx.scale = scale
        return mixed

    @staticmethod
    def backward(ctx, grad):
        refuse_second_derivative()
        needs_dx = ctx.needs_input_grad[1]
        dqueries, dx = torch.ops.stochca.tokens_backward(grad, *ctx.saved_tensors, ctx.scale, needs_dx)
        return dqueries, dx if needs_dx else None, None, None, None, None, None


def attention_tokens(q: Tensor, kv: KV, source_kv: KV, use_source: bool | Tensor, scale: float) -> Tensor:
    """Attend with few rows of queries to tokens, each sample to its own or, by its coin, to the source's.

    Args:
        q: `[B, H, Nq, D]`. Cheaper than keys and values while `Nq < D`.
        kv: A `Projection` of the target's tokens, or None where no sample needs it. Its tokens may require
            grad where they have no factor `rstd`.
        source_kv: The same of the source, which is a constant.
        use_source: One coin, or a bool tensor `[B]`.
        scale: Factor on the scores.

    Returns:
        The output `[B, H, Nq, D]`.

    Raises:
        RuntimeError: Called under a transform of `torch.func`, which the kernels do not have.
        ValueError: Tokens with a factor require grad, or the factor does.
    """
    refuse_functorch()
    if isinstance(use_source, bool):
        side = source_kv if use_source else kv
        assert isinstance(side, Projection)
        mixed = _attend(_queries(q, side), side, None, None, scale)
        return _values(mixed, side, q.shape)
    assert isinstance(kv, Projection)
    assert isinstance(source_kv, Projection)
    # Zeros take the place of the samples that a weight is not for, before each product: a NaN that comes back
    # through the other weight would reach `q` as 0 * NaN.
    coin = use_source[:, None, None]
    own, source = (q.masked_fill(mask[..., None], 0) for mask in (coin, ~coin))
    queries = torch.where(coin, _queries(source, source_kv), _queries(own, kv))
    mixed = _attend(queries, kv, source_kv, use_source, scale)
    own, source = (mixed.masked_fill(mask, 0) for mask in (coin, ~coin))
    return torch.where(coin[..., None], _values(source, source_kv, q.shape), _values(own, kv, q.shape))


def _attend(
    queries: Tensor, side: Projection, source: Projection | None, use_source: Tensor | None, scale: float
) -> Tensor:
    """Mix the tokens of each sample's side for each row of `queries [B, R, C]`."""
    if side.rstd is not None and (side.x.requires_grad or side.rstd.requires_grad):
        raise ValueError("tokens with a factor rstd are a constant, but x or rstd requires grad")
    source_x, source_rstd = (None, None) if source is None else (source.x, source.rstd)
    args = (queries, side.x, side.rstd, source_x, source_rstd, use_source, scale)
    if torch.is_grad_enabled() and (queries.requires_grad or side.x.requires_grad):
        return _Tokens.apply(*args)
    return torch.ops.stochca.tokens_forward(*args)[0]


def _queries(q: Tensor, side: Projection) -> Tensor:
    """Each head's queries in the space of the tokens, `[B, H * Nq, C]`."""
    weight_k = side.weight.unflatten(0, (2, q.shape[1], q.shape[3]))[0]
    return torch.einsum("bhqd,hdc->bhqc", q, weight_k).flatten(1, 2)


def _values(mixed: Tensor, side: Projection, shape: torch.Size) -> Tensor:
    """The values `[B, H, Nq, D]` of mixed tokens `[B, H * Nq, C]`."""
    _, heads, len_q, head_dim = shape
    weight_v = side.weight.unflatten(0, (2, heads, head_dim))[1]
    out = torch.einsum("bhqc,hdc->bhqd", mixed.unflatten(1, (heads, len_q)), weight_v)
    return out if side.bias is None else out + side.bias.view(2, heads, 1, head_dim)[1]
