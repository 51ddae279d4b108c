"""Queries, keys and values of timm's attention modules, each of which can be had without the others.

They are what enters the softmax: projected, split into heads, normalised and rotated as the module says.
"""

from collections.abc import Iterable
from typing import TypeAlias

import torch
from timm.layers import Attention, AttentionRope, apply_rot_embed_cat
from timm.models.eva import EvaAttention
from torch import Tensor, nn
from torch.nn import functional as F

from stochca.lora import is_adapted, is_one_product, merged_rows, project_rows
from stochca_kernels import Projection
from stochca_kernels.attention import keep_in_graph
from stochca_kernels.projection import KV, unpack

AnyAttention: TypeAlias = Attention | EvaAttention | AttentionRope

Rope: TypeAlias = Tensor | None
"""Rotary position embedding of a block as timm makes it, `[N, 2 * D]` or `[H, N, 2 * D]`, for the N tokens
that are no prefix; None without one."""


def head_size(attn: AnyAttention) -> int:
    """Channels of each head; not every timm's attention has its `head_dim`."""
    return attn.proj.in_features // attn.num_heads


def query(attn: AnyAttention, x: Tensor, rope: Rope = None) -> Tensor:
    """Queries `[B, H, N, D]` of normalised tokens `[B, N, C]`: of all, or of prefix tokens alone."""
    return _finish(attn, attn.q_norm, _project(attn, "q", x), rope)


def key(attn: AnyAttention, x: Tensor, rope: Rope = None) -> Tensor:
    """Keys `[B, H, N, D]` of normalised tokens `[B, N, C]`."""
    return _per_query_head(attn, _finish(attn, attn.k_norm, _project(attn, "k", x), rope))


def value(attn: AnyAttention, x: Tensor) -> Tensor:
    """Values `[B, H, N, D]` of normalised tokens `[B, N, C]`."""
    return _per_query_head(attn, _heads(attn, _project(attn, "v", x)))


def key_value(attn: AnyAttention, x: Tensor, rope: Rope = None) -> KV:
    """Keys and values of normalised tokens `[B, N, C]`: left to the operator to compute where it can."""
    if is_linear(attn, rope) and (not is_adapted(attn.qkv) or is_one_product(attn.qkv)):
        return Projection(x, *_rows(attn, "kv"))
    return key(attn, x, rope), value(attn, x)


def query_key_value(attn: AnyAttention, x: Tensor, rope: Rope = None) -> tuple[Tensor, Tensor, Tensor]:
    """All three of normalised tokens `[B, N, C]`.

    They are one product where nothing acts on it. Otherwise values are a product of their own: they would
    keep queries and keys as they were before their norms and rotation in memory until the backward.
    """
    if is_linear(attn, rope):
        return unpack(packed_qkv(attn, x))
    return query(attn, x, rope), key(attn, x, rope), value(attn, x)


def packed_qkv(attn: AnyAttention, x: Tensor) -> Tensor:
    """The product `[B, N, 3, H, D]` of a module for which `is_linear` holds."""
    packed = attn.qkv(x) if getattr(attn, "q_bias", None) is None else F.linear(x, *_rows(attn, "qkv"))
    return packed.unflatten(-1, (3, attn.num_heads, head_size(attn)))


def is_linear(attn: AnyAttention, rope: Rope = None) -> bool:
    """Whether queries, keys and values are rows of one product, on which nothing acts after it."""
    has_no_norms = isinstance(attn.q_norm, nn.Identity) and isinstance(attn.k_norm, nn.Identity)
    return rope is None and has_no_norms and attn.qkv is not None


def keep_key_value(attn: AnyAttention, q: Tensor) -> Tensor:
    """Queries as they are, whose backward leaves zeros in parameters that only keys and values have."""
    return keep_in_graph(q, *(p for p in _of_key_value_alone(attn) if p.requires_grad))


def _of_key_value_alone(attn: AnyAttention) -> Iterable[Tensor]:
    yield from attn.k_norm.parameters()
    if attn.qkv is None:
        yield from attn.k_proj.parameters()
        yield from attn.v_proj.parameters()


def _project(attn: AnyAttention, part: str, x: Tensor) -> Tensor:
    """Tokens `[B, N, C]` to `[B, N, H * D]`, of keys and values with as many heads as those have."""
    if attn.qkv is None:
        return getattr(attn, f"{part}_proj")(x)
    if is_adapted(attn.qkv):
        return project_rows(attn.qkv, x, _slice(attn, part))
    return F.linear(x, *_rows(attn, part))


def _slice(attn: AnyAttention, parts: str) -> slice:
    """The rows of some of "qkv", which lie beside each other."""
    size, first = attn.num_heads * head_size(attn), "qkv".index(parts)
    return slice(first * size, (first + len(parts)) * size)


def _rows(attn: AnyAttention, parts: str) -> tuple[Tensor, Tensor | None]:
    """Weight and bias of some of "qkv"."""
    rows = _slice(attn, parts)
    if is_adapted(attn.qkv):
        return merged_rows(attn.qkv, rows)
    bias = attn.qkv.bias
    if getattr(attn, "q_bias", None) is not None:
        bias = torch.cat((attn.q_bias, attn.k_bias, attn.v_bias))  # keys have a constant zero
    return attn.qkv.weight[rows], None if bias is None else bias[rows]


def _heads(attn: AnyAttention, x: Tensor) -> Tensor:
    return x.unflatten(-1, (-1, head_size(attn))).transpose(1, 2)


def _finish(attn: AnyAttention, norm: nn.Module, projected: Tensor, rope: Rope) -> Tensor:
    return _rotated(attn, norm(_heads(attn, projected)), rope, projected.dtype)


def _rotated(attn: AnyAttention, x: Tensor, rope: Rope, dtype: torch.dtype) -> Tensor:
    """Rotate all but the prefix tokens of `x [B, H, N, D]`, which may be prefix tokens alone."""
    if rope is None:
        return x
    prefix, patches = x.tensor_split([attn.num_prefix_tokens], dim=2)
    if not patches.shape[2]:
        # A rotation may be learned, and needs a gradient then.
        return keep_in_graph(x.to(dtype), *([rope] if rope.requires_grad else []))
    layout = {"half": True} if getattr(attn, "rotate_half", False) else {}  # since timm 1.0.20
    return torch.cat((prefix, apply_rot_embed_cat(patches, rope, **layout)), dim=2).to(dtype)


def _per_query_head(attn: AnyAttention, x: Tensor) -> Tensor:
    """Repeat heads of keys or values that several heads of queries share."""
    groups = attn.num_heads // x.shape[1]
    return x if groups == 1 else x.repeat_interleave(groups, dim=1)
