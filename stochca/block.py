"""One lockstep step: the source's block, which hands over its keys and values, then the target's."""

from collections.abc import Iterable
from typing import TypeAlias

from timm.models.eva import EvaBlock
from torch import Tensor, nn

from stochca.attention import Coin, cross_attention, merge_heads
from stochca.precision import product_dtype
from stochca.qkv import Rope, key_value, query
from stochca.vit import AnyBlock
from stochca_kernels import stochca_attention
from stochca_kernels.dispatch import Impl
from stochca_kernels.projection import KV, pair_of

Masks: TypeAlias = tuple[Tensor, Tensor] | None


def drop_path_masks(blocks: Iterable[AnyBlock], x: Tensor) -> list[Masks]:
    """Draw the stochastic depth of a step before any block runs, as the coins are.

    Args:
        blocks: The target's blocks.
        x: Tokens `[B, N, C]`, for B, dtype and device.

    Returns:
        For each block, the factors `[B, 1, 1]` of its two branches; None for all blocks if none drops paths.
    """
    blocks = list(blocks)
    drops = [(block.drop_path1, block.drop_path2) for block in blocks]
    if all(isinstance(drop, nn.Identity) or not drop.training for pair in drops for drop in pair):
        return [None] * len(blocks)

    def mask(drop: nn.Module) -> Tensor:
        return drop(x.new_ones(x.shape[0], 1, 1))

    return [(mask(first), mask(second)) for first, second in drops]


def target_step(
    block: AnyBlock,
    x: Tensor,
    source_kv: KV,
    coin: Coin,
    rope: Rope = None,
    masks: Masks = None,
    num_rows: int | None = None,
    impl: Impl = "auto",
) -> Tensor:
    """Run a block of the target.

    Keys, values, the coin and the masks are arguments, never state of a module: activation checkpointing
    runs this function a second time and must meet the same ones.

    Args:
        block: timm's block, unchanged.
        x: Tokens `[B, N, C]`.
        source_kv: The source's keys and values of the same block, or None where `coin` is False.
        coin: What the block reads.
        rope: The target's rotary embedding.
        masks: Factors `[B, 1, 1]` of the two residual branches, or None.
        num_rows: Only the first so many tokens are read by anything that follows; all of them where None.
        impl: Implementation of the operator.

    Returns:
        Tokens `[B, num_rows or N, C]`.
    """
    y = normalized(block, x)
    out = cross_attention(block.attn, y, source_kv, coin, rope=rope, num_queries=num_rows, impl=impl)
    x = x if num_rows is None else x[:, :num_rows]
    return residuals(block, x, out, masks)


def source_step(
    block: AnyBlock,
    x: Tensor,
    need_kv: bool,
    advance: bool,
    few_queries: bool = False,
    rope: Rope = None,
    impl: Impl = "auto",
) -> tuple[KV, Tensor | None, Tensor]:
    """Run as much of a block of the frozen source as anything needs. Call it under `torch.no_grad`.

    Args:
        block: timm's block, in eval mode.
        x: The source's tokens `[B, N, C]`.
        need_kv: The target's block reads the source.
        advance: A later block of the source is needed.
        few_queries: Only class rows of the target will ask, so the pair itself need not exist.
        rope: The source's rotary embedding.
        impl: Implementation of the operator.

    Returns:
        The source's keys and values or None; the normalised tokens that they are made of; and the tokens
        after the block where `advance`, else unchanged.
    """
    if not need_kv:
        return None, None, target_step(block, x, None, False, rope, impl=impl) if advance else x
    y = normalized(block, x)
    source_kv = pair = key_value(block.attn, y, rope)
    if advance or not few_queries:
        # Apart from the queries, so that only keys and values stay in memory until the backward.
        pair = pair_of(pair, block.attn.num_heads)
    if advance:
        q = query(block.attn, y, rope)
        out = stochca_attention(q, pair, None, False, scale=block.attn.scale, impl=impl)
        x = residuals(block, x, merge_heads(block.attn, out, y))
    return source_kv if few_queries else pair, y, x


def normalized(block: AnyBlock, x: Tensor) -> Tensor:
    """The tokens that attention projects, cast once for all its products."""
    y = block.norm1(x)
    return y.to(product_dtype(y))


def residuals(block: AnyBlock, x: Tensor, attention: Tensor, masks: Masks = None) -> Tensor:
    """Add the branch of attention to the tokens, then that of the MLP."""
    branch = _layer_scaled(block, 1, attention)
    x = x + (branch if masks is None else branch * masks[0])
    branch = _layer_scaled(block, 2, block.mlp(block.norm2(x)))
    return x + (branch if masks is None else branch * masks[1])


def _layer_scaled(block: AnyBlock, number: int, branch: Tensor) -> Tensor:
    """Multiply by what is a module in timm's `Block`, and a parameter or None in its `EvaBlock`."""
    if not isinstance(block, EvaBlock):
        return getattr(block, f"ls{number}")(branch)
    gamma = getattr(block, f"gamma_{number}")
    return branch if gamma is None else gamma * branch
