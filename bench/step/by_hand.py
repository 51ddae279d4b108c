"""StochCA as a good engineer would write it today on timm's blocks and torch's SDPA.

Target and source advance block by block, so that one block's k, v of the source exist at a time. A block that
reads them projects none of its own. The source runs to its end in every step, and all tokens are computed.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from timm.layers import Attention
from timm.models.vision_transformer import Block
from torch import Tensor
from torch.nn import functional as F

from stochca.vit import TimmViT


class ByHand:
    """The forward of a step.

    Args:
        target: The model that is trained.
        source: The frozen one.
        compiled: Compile the three functions of a block, which all blocks share: a coin chooses between two
            graphs and recompiles nothing.
    """

    def __init__(self, target: TimmViT, source: TimmViT, compiled: bool = False) -> None:
        self.target, self.source = target, source
        wrap: Callable[[Any], Any] = torch.compile if compiled else lambda function: function
        self._self, self._cross, self._of_source = map(wrap, (self_block, cross_block, source_block))

    def __call__(self, images: Tensor, coins: Sequence[bool]) -> Tensor:
        """Logits `[B, classes]` of images `[B, 3, H, W]` under one coin per block."""
        x = embed(self.target, images)
        with torch.no_grad():
            x0 = embed(self.source, images)
        for block, source_block, coin in zip(self.target.blocks, self.source.blocks, coins, strict=True):
            with torch.no_grad():
                x0, k0, v0 = self._of_source(source_block, x0)
            x = self._cross(block, x, k0, v0) if coin else self._self(block, x)
        return self.target.forward_head(self.target.norm(x))


def embed(vit: TimmViT, images: Tensor) -> Tensor:
    """Images `[B, 3, H, W]` to tokens `[B, N, C]`."""
    return vit.norm_pre(vit._pos_embed(vit.patch_embed(images)))


def self_block(block: Block, x: Tensor) -> Tensor:
    """A block that reads its own keys and values."""
    q, k, v = qkv(block.attn, block.norm1(x))
    return residuals(block, x, F.scaled_dot_product_attention(q, k, v))


def cross_block(block: Block, x: Tensor, k0: Tensor, v0: Tensor) -> Tensor:
    """A block that reads the source's: it projects queries alone."""
    q = query(block.attn, block.norm1(x))
    return residuals(block, x, F.scaled_dot_product_attention(q, k0, v0))


def source_block(block: Block, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """A block of the source: its tokens `[B, N, C]`, keys and values `[B, H, N, D]`.

    Queries are projected apart, so that no pair keeps them alive.
    """
    y = block.norm1(x)
    q, (k, v) = query(block.attn, y), key_value(block.attn, y)
    return residuals(block, x, F.scaled_dot_product_attention(q, k, v)), k, v


def qkv(attn: Attention, y: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Queries, keys and values `[B, H, N, D]` of normalised tokens `[B, N, C]`."""
    packed = attn.qkv(y).unflatten(-1, (3, attn.num_heads, attn.head_dim))
    q, k, v = packed.permute(2, 0, 3, 1, 4).unbind(0)
    return attn.q_norm(q), attn.k_norm(k), v


def query(attn: Attention, y: Tensor) -> Tensor:
    """Queries `[B, H, N, D]` alone."""
    (q,) = _project(attn, y, slice(None, attn.num_heads * attn.head_dim))
    return attn.q_norm(q)


def key_value(attn: Attention, y: Tensor) -> tuple[Tensor, Tensor]:
    """Keys and values `[B, H, N, D]` alone."""
    k, v = _project(attn, y, slice(attn.num_heads * attn.head_dim, None))
    return attn.k_norm(k), v


def _project(attn: Attention, y: Tensor, rows: slice) -> tuple[Tensor, ...]:
    """What some rows of the weight of q, k and v make."""
    bias = None if attn.qkv.bias is None else attn.qkv.bias[rows]
    packed = F.linear(y, attn.qkv.weight[rows], bias).unflatten(-1, (-1, attn.num_heads, attn.head_dim))
    return packed.permute(2, 0, 3, 1, 4).unbind(0)


def residuals(block: Block, x: Tensor, attention: Tensor) -> Tensor:
    """What follows attention `[B, H, N, D]` in a block."""
    x = x + block.ls1(block.attn.proj(attention.transpose(1, 2).flatten(2)))
    return x + block.ls2(block.mlp(block.norm2(x)))
