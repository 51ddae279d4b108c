"""What StochCA relies on in a timm Vision Transformer, and which models it refuses, with the reason."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, TypeAlias

import timm
from timm.layers import Attention, AttentionRope
from timm.models.deit import VisionTransformerDistilled
from timm.models.eva import Eva, EvaAttention, EvaBlock
from timm.models.naflexvit import NaFlexVit
from timm.models.vision_transformer import Block, VisionTransformer
from torch import Tensor, nn

from stochca.attention import StochCAAttention
from stochca.lora import check_adapter, is_adapted
from stochca.qkv import Rope, head_size
from stochca_kernels.checks import is_head_size

TimmViT: TypeAlias = VisionTransformer | NaFlexVit | Eva
AnyBlock: TypeAlias = Block | EvaBlock

_FAMILIES = (VisionTransformer, NaFlexVit, Eva)
_BLOCKS = (Block, EvaBlock)
_ATTENTIONS = (Attention, StochCAAttention, EvaAttention, AttentionRope)


class Stem(NamedTuple):
    """What a model makes of images before its first block.

    Args:
        tokens: `[B, N, C]`.
        ropes: The rotary position embedding of each block.
    """

    tokens: Tensor
    ropes: Sequence[Rope]


def check_drivable(model: Any) -> None:
    """Refuse a model whose forward is not the one that the lockstep reproduces.

    Raises:
        TypeError: The model, its blocks or its attention are of another kind.
        ValueError: It is of the right kind, with a part that StochCA cannot drive.
    """
    name = type(model).__name__
    family = next((family for family in _FAMILIES if isinstance(model, family)), None)
    if family is None:
        inside = ": pass its get_base_model()" if hasattr(model, "get_base_model") else ""
        if hasattr(model, "_orig_mod"):  # of torch.compile
            inside = ": pass the model itself, and call compile() of the StochCA"
        raise TypeError(f"StochCA drives timm's VisionTransformer, NaFlexVit and Eva, got {name}{inside}")
    for method in ("forward", "forward_features"):
        if getattr(type(model), method) is not getattr(family, method):
            raise TypeError(f"{name} has a {method} of its own, which StochCA cannot reproduce")
    if family is NaFlexVit and not hasattr(model, "_forward_embeds"):
        raise TypeError(f"the {name} of this timm ({timm.__version__}) cannot be driven, that of 1.0.24 can")
    if getattr(getattr(model, "patch_drop", None), "prob", 0.0):
        raise ValueError(
            f"{name} has patch dropout: target and source would see different tokens. Use patch_drop_rate=0"
        )
    for i, block in enumerate(model.blocks):
        if type(block).forward not in {kind.forward for kind in _BLOCKS}:
            raise TypeError(
                f"{name}: block {i} is a {type(block).__name__}; StochCA drives timm's Block and EvaBlock"
            )
        _check_attention(f"{name}: attention {i}", block.attn)


def _check_attention(name: str, attn: Any) -> None:
    if type(attn).forward not in {kind.forward for kind in _ATTENTIONS}:
        raise TypeError(
            f"{name} is a {type(attn).__name__}; StochCA drives timm's Attention, EvaAttention and "
            "AttentionRope"
        )
    projections = ("qkv",) if attn.qkv is not None else ("q_proj", "k_proj", "v_proj")
    for part in projections:
        layer = getattr(attn, part)
        if is_adapted(layer):
            check_adapter(f"{name}: its {part}", layer)
            if getattr(attn, "q_bias", None) is not None:
                raise ValueError(
                    f"{name}: timm's {type(attn).__name__} reads the weight of its qkv past an adapter, "
                    "which does nothing there: adapt other layers, as proj and those of the MLP"
                )
        elif type(layer) is not nn.Linear:
            raise TypeError(f"{name}: its {part} is a {type(layer).__name__}, not a plain Linear")
    if not is_head_size(head_size(attn)):
        raise ValueError(f"{name}: the head size must be 16 to 128 in steps of 8, got {head_size(attn)}")


def check_pair(target: TimmViT, source: TimmViT) -> None:
    """Refuse a source whose keys and values mean something else than the target's.

    Raises:
        ValueError: They differ, in what and how.
    """
    if source is target:
        raise ValueError("source is the target itself: pass a copy, or None to have one made")
    if moves_positions(target) and (
        list(target.rope.parameters()) or image_size(target) != image_size(source)
    ):
        raise ValueError(
            "the target shifts or scales its rotary positions in training, which a source follows only where "
            "the rotation is not learned and images have one size: leave out rope_shift_coords, "
            "rope_jitter_coords and rope_rescale_coords"
        )
    wanted, got = _description(target), _description(source)
    differing = [
        f"{key}: target {wanted[key]}, source {got[key]}" for key in wanted if wanted[key] != got[key]
    ]
    if differing:
        raise ValueError(
            "source and target must be of one architecture; they differ in " + "; ".join(differing)
        )


def stem(model: TimmViT, images: Tensor) -> Stem:
    """Everything before the blocks, of images `[B, 3, H, W]`."""
    depth = len(model.blocks)
    if isinstance(model, NaFlexVit):
        embeds = model._forward_embeds(images, None, None, None)
        tokens, rope, is_mixed = embeds["patches"], embeds["rope_embeds"], model.rope_is_mixed
    elif isinstance(model, Eva):
        tokens, rope = model._pos_embed(model.patch_embed(images))
        tokens, is_mixed = model.norm_pre(tokens), getattr(model, "rope_mixed", False)
    else:
        return Stem(model.norm_pre(model._pos_embed(model.patch_embed(images))), [None] * depth)
    return Stem(tokens, list(rope)[:depth] if is_mixed and rope is not None else [rope] * depth)


def moves_positions(model: TimmViT) -> bool:
    """Whether a model shifts or scales the positions of its rotary embedding at random in training."""
    return getattr(getattr(model, "rope", None), "aug_active", False)


def image_size(model: TimmViT) -> tuple[int, int] | None:
    """The size of images that a model takes; None where it takes several."""
    embed: Any = getattr(model, "patch_embed", None)  # which NaFlexVit has not
    if embed is None or embed.img_size is None or not getattr(embed, "strict_img_size", True):
        return None
    return tuple(embed.img_size)


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
    if {len(values) for values in statistics} != {_num_channels(target)}:
        raise ValueError(
            "source and target are normalised differently, but their pretrained_cfg has not one mean and one "
            f"std for each of the {_num_channels(target)} input channels: {statistics}"
        )
    channels = list(zip(*statistics, strict=True))
    return [s / s0 for _, s, _, s0 in channels], [(m - m0) / s0 for m, _, m0, s0 in channels]


def _description(model: TimmViT) -> dict[str, object]:
    """What must agree for block `l` of one model to read block `l` of the other."""
    embed, tokens = (model.embeds,) * 2 if isinstance(model, NaFlexVit) else (model.patch_embed, model)
    parts: dict[str, Callable[[AnyBlock], object]] = {
        "heads": lambda block: block.attn.num_heads,
        "head size": lambda block: head_size(block.attn),
        "norm": lambda block: type(block.norm1).__name__,
        "norm of queries": lambda block: type(block.attn.q_norm).__name__,
        "norm of keys": lambda block: type(block.attn.k_norm).__name__,
        "rotation of halves": lambda block: getattr(block.attn, "rotate_half", False),
    }
    return {
        "family": type(model).__name__,
        "depth": len(model.blocks),
        "width": model.embed_dim,
        **{name: _common([part(block) for block in model.blocks]) for name, part in parts.items()},
        "norm before the blocks": type(model.norm_pre).__name__,
        "rotary embedding": type(getattr(model, "rope", None)).__name__,
        "class token": getattr(tokens, "cls_token", None) is not None,
        "prefix tokens": model.num_prefix_tokens,
        "input channels": _num_channels(model),
        "patch size": embed.patch_size,
    }


def _num_channels(model: Any) -> int | None:
    """Of images, which timm's models have not always said."""
    convolutions = (m.in_channels for m in model.modules() if isinstance(m, nn.Conv2d))
    return next(convolutions, getattr(model, "in_chans", None))


def _common(values: list[object]) -> object:
    """The value that all blocks have, or all their values."""
    return values[0] if all(value == values[0] for value in values) else values
