"""Attention of timm's modules to keys and values of their own, of a frozen source, or of both."""

from typing import Literal, NamedTuple, TypeAlias

import torch
from timm.layers import Attention
from torch import Tensor
from torch.nn import functional as F

from stochca.qkv import (
    AnyAttention,
    Rope,
    head_size,
    is_linear,
    keep_key_value,
    key_value,
    packed_qkv,
    query,
    query_key_value,
)
from stochca_kernels import Projection, stochca_attention
from stochca_kernels.dispatch import Impl
from stochca_kernels.projection import KV, pair_of


class Blend(NamedTuple):
    """A deterministic alternative to the coin: every block reads both pairs.

    Args:
        kind: "mix" is `(1 - alpha) SA + alpha CA`, "sum" is `SA + CA`, "concat" one softmax over both.
        alpha: The source's share in a "mix".
    """

    kind: Literal["mix", "sum", "concat"]
    alpha: float = 1.0


Coin: TypeAlias = bool | Tensor | Blend
"""What a block reads: its own pair (False), the source's (True), one of them per sample (`[B]`), or both."""


class StochCAAttention(Attention):
    """`timm.layers.Attention` that can read the keys and values of a frozen source.

    Same constructor, same state dict, and without a source the same output bit for bit. Use it as
    `timm.create_model(..., attn_layer=StochCAAttention)`, or on its own in any model:

        kv = frozen.source_kv(norm1_of_frozen(x0))  # frozen: another StochCAAttention
        out = attention(norm1(x), source_kv=kv, use_source=coin)

    `impl` (class or instance attribute) chooses the implementation of the operator.
    """

    impl: Impl = "auto"

    def forward(
        self,
        x: Tensor,
        attn_mask: Tensor | None = None,
        is_causal: bool = False,
        source_kv: KV = None,
        use_source: Coin = True,
    ) -> Tensor:
        """Attend to `x`, or to a source.

        Args:
            x: Normalised tokens `[B, N, C]`.
            attn_mask: As in torch's `scaled_dot_product_attention`.
            is_causal: As there.
            source_kv: What `source_kv` of the frozen attention returned, or None for self-attention.
            use_source: One coin, or a bool tensor `[B]`. Ignored without a source.

        Returns:
            `[B, N, C]`.

        Raises:
            ValueError: The source's pair does not fit, see `stochca_kernels.stochca_attention`.
        """
        if source_kv is None:
            return super().forward(x, **_mask_arguments(attn_mask, is_causal))
        return cross_attention(
            self, x, source_kv, use_source, impl=self.impl, attn_mask=attn_mask, is_causal=is_causal
        )

    def source_kv(self, x: Tensor) -> KV:
        """Make the argument `source_kv` of another attention from this frozen one.

        Args:
            x: The source's normalised tokens `[B, N, C]`.

        Returns:
            A constant, either a `Projection`, or a pair of `[B, H, N, D]` where keys are normalised.
        """
        with torch.no_grad():
            kv = key_value(self, x.detach())
        if isinstance(kv, Projection):
            return kv._replace(weight=kv.weight.detach(), bias=None if kv.bias is None else kv.bias.detach())
        return kv


def cross_attention(
    attn: AnyAttention,
    x: Tensor,
    source_kv: KV,
    coin: Coin,
    *,
    rope: Rope = None,
    num_queries: int | None = None,
    impl: Impl = "auto",
    attn_mask: Tensor | None = None,
    is_causal: bool = False,
) -> Tensor:
    """Run a timm attention module on its own keys and values, on the source's, or both.

    What no sample needs is not computed: a block that reads the source projects neither K nor V of its own,
    and their rows of the weight's gradient are exactly zero.

    Args:
        attn: The target's attention: its projections, norms, gate and dropouts act in every case.
        x: Normalised tokens `[B, N, C]`.
        source_kv: The source's keys and values, rotated where they are; None where `coin` is False.
        coin: What to read.
        rope: Rotary embedding of the target's queries and keys.
        num_queries: Only the first so many tokens ask, prefix tokens; all of them where None.
        impl: Implementation of the operator.
        attn_mask: As in torch's `scaled_dot_product_attention`.
        is_causal: As there.

    Returns:
        `[B, num_queries or N, C]`.
    """
    dropout = attn.attn_drop.p if attn.training else 0.0
    is_masked = bool(dropout) or attn_mask is not None or is_causal
    if is_masked and impl not in ("auto", "sdpa"):
        raise ValueError(f'attention dropout and masks run on impl="sdpa" alone, got impl={impl!r}')
    asking = x if num_queries is None else x[:, :num_queries]
    if num_queries is None and x.shape[1] < head_size(attn) and source_kv is not None:
        # All rows of few tokens are few rows to the operator, but cost less, and round less, with the pair.
        source_kv = pair_of(source_kv, attn.num_heads)
    own: KV = None
    if coin is True:
        q = keep_key_value(attn, query(attn, asking, rope))
    elif num_queries is not None:
        q, own = query(attn, asking, rope), key_value(attn, x, rope)
    elif is_linear(attn, rope) and not is_masked and not isinstance(coin, Blend):
        # One gradient in the layout of the projection, which no copy need bring together.
        packed = packed_qkv(attn, x)
        out = stochca_attention(packed, None, source_kv, coin, scale=attn.scale, impl=impl)
        return merge_heads(attn, out, x)
    else:
        q, k, v = query_key_value(attn, x, rope)
        own = k, v
    if is_masked:
        out = _masked_attention(attn, q, own, source_kv, coin, dropout, attn_mask, is_causal)
    else:
        out = _attend(attn, q, own, source_kv, coin, impl)
    return merge_heads(attn, out, asking)


def merge_heads(attn: AnyAttention, out: Tensor, x: Tensor) -> Tensor:
    """Merge the heads `[B, H, N, D]` and project, through the norm and the gate that some models have."""
    out = out.transpose(1, 2).flatten(2)
    norm, gate = getattr(attn, "norm", None), getattr(attn, "gate", None)
    if norm is not None:
        out = norm(out)
    if gate is not None:
        out = out * gate(x).sigmoid()
    return attn.proj_drop(attn.proj(out))


def _attend(attn: AnyAttention, q: Tensor, own: KV, source: KV, coin: Coin, impl: Impl) -> Tensor:
    scale = attn.scale
    if not isinstance(coin, Blend):
        return stochca_attention(q, own, source, coin, scale=scale, impl=impl)
    if coin.kind == "concat":
        both = _concatenate(pair_of(own, attn.num_heads), pair_of(source, attn.num_heads))
        return stochca_attention(q, both, None, False, scale=scale, impl=impl)
    to_own = stochca_attention(q, own, None, False, scale=scale, impl=impl)
    to_source = stochca_attention(q, None, source, True, scale=scale, impl=impl)
    return to_own + to_source if coin.kind == "sum" else torch.lerp(to_own, to_source, coin.alpha)


def _masked_attention(
    attn: AnyAttention,
    q: Tensor,
    own: KV,
    source: KV,
    coin: Coin,
    dropout: float,
    attn_mask: Tensor | None,
    is_causal: bool,
) -> Tensor:
    """Attention with what the operator leaves out, on torch's SDPA: dropout of probabilities, and masks."""

    def attend(kv: KV) -> Tensor:
        return F.scaled_dot_product_attention(
            q,
            *pair_of(kv, attn.num_heads),
            attn_mask=attn_mask,
            dropout_p=dropout,
            is_causal=is_causal,
            scale=attn.scale,
        )

    if isinstance(coin, bool):
        return attend(source if coin else own)
    if isinstance(coin, Blend):
        if coin.kind == "concat":
            raise ValueError('mode="concat" takes neither attention dropout nor a mask')
        to_own, to_source = attend(own), attend(source)
        return to_own + to_source if coin.kind == "sum" else torch.lerp(to_own, to_source, coin.alpha)
    own, source = pair_of(own, attn.num_heads), pair_of(source, attn.num_heads)
    if own[0].shape != source[0].shape:
        raise ValueError(
            "a coin per sample takes attention dropout and masks only where target and source have as many "
            f"tokens, got {own[0].shape[2]} and {source[0].shape[2]}"
        )
    k, v = (torch.where(coin[:, None, None, None], s, t) for t, s in zip(own, source, strict=True))
    return attend((k, v))


def _concatenate(own: tuple[Tensor, Tensor], source: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    k, v = (torch.cat(pair, dim=2) for pair in zip(own, source, strict=True))
    return k, v


def _mask_arguments(attn_mask: Tensor | None, is_causal: bool) -> dict[str, Tensor | bool]:
    """Only what is asked for: `is_causal` exists since timm 1.0.26. torch.fx gives neither True nor False."""
    arguments: dict[str, Tensor | bool] = {} if attn_mask is None else {"attn_mask": attn_mask}
    return arguments if is_causal is False else {**arguments, "is_causal": is_causal}
