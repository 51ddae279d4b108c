"""StochCA as its authors compute it, from the description of their method.

The whole source runs first and keeps queries, keys and values of all its blocks. Then the target runs: every
block projects its own, scores are materialised, and all tokens are computed to the end.
"""

from collections.abc import Sequence

import torch
from timm.models.vision_transformer import Block
from torch import Tensor

from stochca.vit import TimmViT

Triple = tuple[Tensor, Tensor, Tensor]


def forward(target: TimmViT, source: TimmViT, images: Tensor, coins: Sequence[bool]) -> Tensor:
    """Logits `[B, classes]` under one coin per block."""
    with torch.no_grad():
        kept: list[Triple] = []
        _run(source, images, [None] * len(coins), kept)
    read = [triple if coin else None for triple, coin in zip(kept, coins, strict=True)]
    tokens = _run(target, images, read)
    return target.forward_head(target.norm(tokens))


def _run(
    vit: TimmViT, images: Tensor, read: Sequence[Triple | None], kept: list[Triple] | None = None
) -> Tensor:
    """Tokens `[B, N, C]` after all blocks; `read` replaces a block's k, v; `kept` receives its q, k, v."""
    x = vit.norm_pre(vit._pos_embed(vit.patch_embed(images)))
    for block, other in zip(vit.blocks, read, strict=True):
        q, k, v = _project(block, block.norm1(x))
        if kept is not None:
            kept.append((q, k, v))
        if other is not None:
            _, k, v = other
        x = x + block.ls1(_attend(block, q, k, v))
        x = x + block.ls2(block.mlp(block.norm2(x)))
    return x


def _project(block: Block, y: Tensor) -> Triple:
    """Queries, keys and values `[B, H, N, D]`."""
    attn = block.attn
    batch, length, _ = y.shape
    qkv = attn.qkv(y).reshape(batch, length, 3, attn.num_heads, attn.head_dim).permute(2, 0, 3, 1, 4)
    q, k, v = qkv.unbind(0)
    return attn.q_norm(q), attn.k_norm(k), v


def _attend(block: Block, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    attn = block.attn
    scores = torch.einsum("bhid,bhjd->bhij", q, k) * attn.scale
    out = torch.einsum("bhij,bhjd->bihd", scores.softmax(dim=-1), v)
    return attn.proj(out.flatten(2))
