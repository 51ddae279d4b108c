"""What StochCA relies on in a timm Vision Transformer, and which models it refuses, with the reason."""

from collections.abc import Callable
from typing import TypeAlias

import timm
from timm.layers import Attention
from timm.models.deit import VisionTransformerDistilled
from timm.models.naflexvit import NaFlexVit
from timm.models.vision_transformer import Block, VisionTransformer
from torch import Tensor, nn

from stochca.attention import StochCAAttention
from stochca_kernels.checks import is_head_size

TimmViT: TypeAlias = VisionTransformer | NaFlexVit


def check_drivable(model: nn.Module) -> None:
    """Refuse a model whose forward is not the one that the lockstep reproduces.

    Raises:
        TypeError: The model, its blocks or its attention are of another kind.
        ValueError: It is of the right kind, with a part that StochCA cannot drive.
    """
    name = type(model).__name__
    if not isinstance(model, VisionTransformer | NaFlexVit):
        raise TypeError(f"StochCA drives timm's VisionTransformer and NaFlexVit, got {name}")
    family = NaFlexVit if isinstance(model, NaFlexVit) else VisionTransformer
    for method in ("forward", "forward_features"):
        if getattr(type(model), method) is not getattr(family, method):
            raise TypeError(f"{name} has a {method} of its own, which StochCA cannot reproduce")
    if isinstance(model, NaFlexVit) and not hasattr(model, "_forward_embeds"):
        raise TypeError(f"the {name} of this timm ({timm.__version__}) cannot be driven, that of 1.0.24 can")
    if getattr(model, "rope", None) is not None:
        raise ValueError(f"{name} uses rotary position embeddings, which StochCA does not support")
    if getattr(getattr(model, "patch_drop", None), "prob", 0.0):
        raise ValueError(
            f"{name} has patch dropout: target and source would see different tokens. Use patch_drop_rate=0"
        )
    for i, block in enumerate(model.blocks):
        if type(block).forward is not Block.forward:
            raise TypeError(f"{name}: block {i} is a {type(block).__name__}; StochCA drives timm's Block")
        attn = block.attn
        if type(attn).forward not in (Attention.forward, StochCAAttention.forward):
            raise TypeError(
                f"{name}: attention {i} is a {type(attn).__name__}; StochCA drives timm's Attention"
            )
        if type(attn.qkv) is not nn.Linear:
            raise TypeError(
                f"{name}: the qkv of block {i} is a {type(attn.qkv).__name__}, not a plain Linear"
            )
        if not is_head_size(attn.head_dim):
            raise ValueError(f"{name}: the head size must be 16 to 128 in steps of 8, got {attn.head_dim}")


def check_pair(target: TimmViT, source: TimmViT) -> None:
    """Refuse a source whose keys and values mean something else than the target's.

    Raises:
        ValueError: They differ, in what and how.
    """
    if source is target:
        raise ValueError("source is the target itself: pass a copy, or None to have one made")
    wanted, got = _description(target), _description(source)
    differing = [
        f"{key}: target {wanted[key]}, source {got[key]}" for key in wanted if wanted[key] != got[key]
    ]
    if differing:
        raise ValueError(
            "source and target must be of one architecture; they differ in " + "; ".join(differing)
        )


def stem(model: TimmViT, images: Tensor) -> Tensor:
    """Everything before the blocks: images `[B, 3, H, W]` to tokens `[B, N, C]`."""
    if isinstance(model, NaFlexVit):
        return model._forward_embeds(images, None, None, None)["patches"]
    return model.norm_pre(model._pos_embed(model.patch_embed(images)))


def num_class_rows(model: TimmViT) -> int | None:
    """How many of the first tokens the head reads; None where it reads others as well."""
    if model.global_pool != "token" or getattr(model, "attn_pool", None) is not None:
        return None
    return 2 if isinstance(model, VisionTransformerDistilled) else 1


def renormalization(target: TimmViT, source: TimmViT) -> tuple[list[float], list[float]] | None:
    """Factor and shift of each channel that turn the target's normalised images into the source's.

    None where both models' `pretrained_cfg` name the same mean and standard deviation, or one names none.
    """
    configs = [getattr(model, "pretrained_cfg", None) or {} for model in (target, source)]
    statistics = [tuple(config.get(key) or ()) for config in configs for key in ("mean", "std")]
    if not all(statistics) or statistics[:2] == statistics[2:]:
        return None
    if {len(values) for values in statistics} != {target.in_chans}:
        raise ValueError(
            "source and target are normalised differently, but their pretrained_cfg has not one mean and one "
            f"std for each of the {target.in_chans} input channels: {statistics}"
        )
    channels = list(zip(*statistics, strict=True))
    return [s / s0 for _, s, _, s0 in channels], [(m - m0) / s0 for m, _, m0, s0 in channels]


def _description(model: TimmViT) -> dict[str, object]:
    """What must agree for block `l` of one model to read block `l` of the other."""
    embed, tokens = (model.embeds,) * 2 if isinstance(model, NaFlexVit) else (model.patch_embed, model)
    parts: dict[str, Callable[[Block], object]] = {
        "heads": lambda block: block.attn.num_heads,
        "head size": lambda block: block.attn.head_dim,
        "norm": lambda block: type(block.norm1).__name__,
        "norm of queries": lambda block: type(block.attn.q_norm).__name__,
        "norm of keys": lambda block: type(block.attn.k_norm).__name__,
    }
    return {
        "family": type(model).__name__,
        "depth": len(model.blocks),
        "width": model.embed_dim,
        **{name: _common([part(block) for block in model.blocks]) for name, part in parts.items()},
        "norm before the blocks": type(model.norm_pre).__name__,
        "class token": getattr(tokens, "cls_token", None) is not None,
        "prefix tokens": model.num_prefix_tokens,
        "input channels": model.in_chans,
        "image size": getattr(embed, "img_size", None),
        "patch size": embed.patch_size,
    }


def _common(values: list[object]) -> object:
    """The value that all blocks have, or all their values."""
    return values[0] if all(value == values[0] for value in values) else values
