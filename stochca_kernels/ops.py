"""The Triton kernels as operators of torch, `torch.ops.stochca`, which its compilers leave whole."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from stochca_kernels.backward import (
    attention_backward,
    empty_backward,
    launch_backward,
    packed_attention_backward,
)
from stochca_kernels.forward import attention_forward, empty_forward, launch_forward
from stochca_kernels.projected import launch_projected_dq, launch_projected_forward
from stochca_kernels.projection import Projection, unpack
from stochca_kernels.tokens import empty_backward as empty_tokens_backward
from stochca_kernels.tokens import empty_forward as empty_tokens_forward
from stochca_kernels.tokens import tokens_backward, tokens_forward

_library = torch.library.Library("stochca", "FRAGMENT")


def define(schema: str, launch: Callable[..., Any], fake: Callable[..., Any]) -> None:
    """Register an operator: what runs on any device, and what only allocates its results."""
    _library.define(schema)
    name = schema.partition("(")[0]
    _library.impl(name, launch, "CompositeExplicitAutograd")
    torch.library.register_fake(f"stochca::{name}", fake, lib=_library)


def projected_attention_forward(
    q: Tensor,
    k: Tensor | None,
    v: Tensor | None,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    rstd: Tensor | None,
    use_source: Tensor | None,
    source_q: Tensor | None,
    q_weight: Tensor | None,
    q_bias: Tensor | None,
    scale: float,
    needs_lse: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Attend to the target's own pair where a sample's coin is false, and to the source's tokens elsewhere.

    Args:
        q: Queries `[B, H, Nq, D]`.
        k: The target's own keys `[B, H, N, D]`, or None where all samples read the source.
        v: The target's own values.
        x: The source's tokens `[B, Ns, C]`.
        weight: Packed `[2 * H * D, C]`, and so on as in `Projection`.
        bias: `[2 * H * D]`, or None.
        rstd: `[B, Ns]`, or None.
        use_source: Coins `[B]`. Without them all samples read the source, or none where `k` is given.
        source_q: The source's own queries `[B, H, Nsq, D]`, or None.
        q_weight: `[H * D, C]` where they are computed from `x` instead, or None.
        q_bias: `[H * D]`, or None.
        scale: Factor on the scores.
        needs_lse: Whether a backward will follow.

    Returns:
        As `forward.attention_forward`.
    """
    out, lse, source_out = empty_projected_forward(q, x, source_q, q_weight, needs_lse)
    if k is not None and v is not None:
        none = source_out[:, :, :0]
        launch_forward(q, k, v, None, None, use_source, None, scale, out, lse, none)
    asking = q[:, :, :0] if k is not None and use_source is None else q
    source_rows = source_q if q_weight is None else Projection(x, q_weight, q_bias)
    source = Projection(x, weight, bias, rstd)
    launch_projected_forward(asking, source, use_source, source_rows, scale, out, lse, source_out)
    return out, lse, source_out


def projected_attention_backward(
    grad: Tensor,
    q: Tensor,
    k: Tensor | None,
    v: Tensor | None,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    rstd: Tensor | None,
    use_source: Tensor | None,
    out: Tensor,
    lse: Tensor,
    scale: float,
    needs_dkdv: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """The backward of `projected_attention_forward`; returns as `backward.attention_backward`."""
    dq, dk, dv = empty_backward(q, q if k is None else k, needs_dkdv)
    if k is not None and v is not None:
        launch_backward(grad, q, k, v, None, None, use_source, out, lse, scale, dq, dk, dv)
    if k is None or use_source is not None:
        source = Projection(x, weight, bias, rstd)
        launch_projected_dq(grad, q, source, use_source, out, lse, scale, dq)
    return dq, dk, dv


def packed_projected_attention_backward(
    grad: Tensor,
    qkv: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    rstd: Tensor | None,
    use_source: Tensor | None,
    out: Tensor,
    lse: Tensor,
    scale: float,
) -> Tensor:
    """As `projected_attention_backward` of a packed projection `[B, N, 3, H, D]`, written packed."""
    dqkv = torch.empty_like(qkv, memory_format=torch.contiguous_format)
    launch_backward(grad, *unpack(qkv), None, None, use_source, out, lse, scale, *unpack(dqkv))
    if use_source is not None:
        source = Projection(x, weight, bias, rstd)
        launch_projected_dq(grad, unpack(qkv)[0], source, use_source, out, lse, scale, unpack(dqkv)[0])
    return dqkv


def empty_projected_forward(
    q: Tensor, x: Tensor, source_q: Tensor | None, q_weight: Tensor | None, needs_lse: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Allocate what `projected_attention_forward` returns."""
    len_source_q = x.shape[1] if q_weight is not None else 0 if source_q is None else source_q.shape[2]
    return empty_forward(q, len_source_q, needs_lse)


def _empty_like_packed(grad, qkv, *_):
    return torch.empty_like(qkv, memory_format=torch.contiguous_format)


define(
    "attention_forward(Tensor q, Tensor k, Tensor v, Tensor? source_k, Tensor? source_v, Tensor? use_source, "
    "Tensor? source_q, float scale, bool needs_lse) -> (Tensor, Tensor, Tensor)",
    attention_forward,
    lambda q, k, v, source_k, source_v, use_source, source_q, scale, needs_lse: empty_forward(
        q, 0 if source_q is None else source_q.shape[2], needs_lse
    ),
)
define(
    "attention_backward(Tensor grad, Tensor q, Tensor k, Tensor v, Tensor? source_k, Tensor? source_v, "
    "Tensor? use_source, Tensor out, Tensor lse, float scale, bool needs_dkdv) -> (Tensor, Tensor, Tensor)",
    attention_backward,
    lambda grad, q, k, *rest: empty_backward(q, k, rest[-1]),
)
define(
    "packed_attention_backward(Tensor grad, Tensor qkv, Tensor? source_k, Tensor? source_v, "
    "Tensor? use_source, Tensor out, Tensor lse, float scale) -> Tensor",
    packed_attention_backward,
    _empty_like_packed,
)
define(
    "projected_attention_forward(Tensor q, Tensor? k, Tensor? v, Tensor x, Tensor weight, Tensor? bias, "
    "Tensor? rstd, Tensor? use_source, Tensor? source_q, Tensor? q_weight, Tensor? q_bias, float scale, "
    "bool needs_lse) -> (Tensor, Tensor, Tensor)",
    projected_attention_forward,
    lambda q, k, v, x, *rest: empty_projected_forward(q, x, rest[4], rest[5], rest[-1]),
)
define(
    "projected_attention_backward(Tensor grad, Tensor q, Tensor? k, Tensor? v, Tensor x, Tensor weight, "
    "Tensor? bias, Tensor? rstd, Tensor? use_source, Tensor out, Tensor lse, float scale, bool needs_dkdv) "
    "-> (Tensor, Tensor, Tensor)",
    projected_attention_backward,
    lambda grad, q, k, *rest: empty_backward(q, q if k is None else k, rest[-1]),
)
define(
    "packed_projected_attention_backward(Tensor grad, Tensor qkv, Tensor x, Tensor weight, Tensor? bias, "
    "Tensor? rstd, Tensor? use_source, Tensor out, Tensor lse, float scale) -> Tensor",
    packed_projected_attention_backward,
    _empty_like_packed,
)
define(
    "tokens_forward(Tensor queries, Tensor x, Tensor? rstd, Tensor? source_x, Tensor? source_rstd, "
    "Tensor? use_source, float scale) -> (Tensor, Tensor)",
    tokens_forward,
    lambda queries, *_: empty_tokens_forward(queries),
)
define(
    "tokens_backward(Tensor grad, Tensor queries, Tensor x, Tensor? rstd, Tensor? source_x, "
    "Tensor? source_rstd, Tensor? use_source, Tensor mixed, Tensor lse, float scale, bool needs_dx) "
    "-> (Tensor, Tensor)",
    tokens_backward,
    lambda grad, queries, x, *rest: empty_tokens_backward(queries, x, rest[-1]),
)
