"""The Triton kernels as operators of torch, `torch.ops.stochca`, which its compilers leave whole."""

from collections.abc import Callable
from typing import Any

import torch

from stochca_kernels.backward import attention_backward, empty_backward, packed_attention_backward
from stochca_kernels.forward import attention_forward, empty_forward
from stochca_kernels.projected import (
    empty_projected_forward,
    packed_projected_attention_backward,
    projected_attention_backward,
    projected_attention_forward,
)
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
