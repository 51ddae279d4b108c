"""The queries, keys and values of a Vision Transformer's blocks, as they enter attention."""

from collections.abc import Iterator
from typing import NamedTuple

import torch
from timm.models.naflexvit import NaFlexVit
from torch import Tensor

from stochca.block import normalized
from stochca.qkv import query_key_value
from stochca.vit import TimmViT, stem


class Heads(NamedTuple):
    """One block's, after their norms and rotary embeddings.

    Args:
        q: Queries `[B, H, N, D]`.
        k: Keys `[B, H, N, D]`.
        v: Values `[B, H, N, D]`.
        scale: Factor on `q k'`.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    scale: float


class Layout(NamedTuple):
    """Which tokens a sequence has.

    Args:
        has_class: The first one is a class token.
        num_prefix: How many come before the patches.
        grid: Rows and columns of patches.
        distances: `[P, P]`, between the patches in the image, in pixels, row by row; float64.
    """

    has_class: bool
    num_prefix: int
    grid: tuple[int, int]
    distances: Tensor


@torch.no_grad()
def heads_of(model: TimmViT, images: Tensor) -> Iterator[Heads]:
    """Run a model and yield those of each block, one at a time.

    Args:
        model: A model that `stochca.vit.check_drivable` accepts, in eval mode.
        images: `[B, 3, H, W]`, normalised for it.
    """
    x, ropes = stem(model, images)
    for block, rope in zip(model.blocks, ropes, strict=True):
        yield Heads(*query_key_value(block.attn, normalized(block, x), rope), block.attn.scale)
        x = block(x) if rope is None else block(x, rope=rope)


def layout_of(model: TimmViT, images: Tensor) -> Layout:
    """The tokens of a model for images of a size."""
    embed, tokens = (model.embeds,) * 2 if isinstance(model, NaFlexVit) else (model.patch_embed, model)
    rows, columns = embed.dynamic_feat_size(tuple(images.shape[-2:]))
    height, width = embed.patch_size
    positions = torch.cartesian_prod(
        torch.arange(rows, dtype=torch.float64) * height, torch.arange(columns, dtype=torch.float64) * width
    )
    distances = torch.cdist(positions, positions).to(device_of_float64(images))
    has_class = getattr(tokens, "cls_token", None) is not None
    return Layout(has_class, model.num_prefix_tokens, (rows, columns), distances)


def device_of_float64(x: Tensor) -> torch.device:
    """The device of a tensor, or the CPU where that has no float64."""
    return torch.device("cpu") if x.device.type == "mps" else x.device
