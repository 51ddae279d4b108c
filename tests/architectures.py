"""timm's architectures of the families that StochCA drives, and small instances of them."""

import contextlib
import functools
from unittest import mock

import timm
import torch
from timm.layers import HybridEmbed
from timm.models import model_entrypoint
from torch import nn

MODULES = ("deit", "eva", "naflexvit", "vision_transformer", "vision_transformer_hybrid", "vitamin")

# Those of these modules that are refused, and by which words.
REFUSED = {
    "eva02_enormous_patch14_clip_224": "block 0 is a EvaBlockPostNorm",
    "vit_5b_patch16_sapiens2": "head size must be 16 to 128 in steps of 8, got 76",
    "vit_base_patch16_18x2_224": "block 0 is a ParallelThingsBlock",
    "vit_base_patch16_rpn_224": "block 0 is a ResPostBlock",
    "vit_base_patch16_xp_224": "block 0 is a ParallelScalingBlock",
    "vit_dlittle_patch16_reg1_gap_256": "attention 0 is a DiffAttention",
    "vit_dpwee_patch16_reg1_gap_256": "block 0 is a DiffParallelScalingBlock",
    "vit_dwee_patch16_reg1_gap_256": "attention 0 is a DiffAttention",
    "vit_huge_patch14_xp_224": "block 0 is a ParallelScalingBlock",
    "vit_large_patch14_xp_224": "block 0 is a ParallelScalingBlock",
    "vit_pwee_patch16_reg1_gap_256": "block 0 is a ParallelScalingBlock",
    "vit_small_patch16_18x2_224": "block 0 is a ParallelThingsBlock",
}


def module_of(name):
    """The module of timm in which an architecture is."""
    return model_entrypoint(name).__module__.rpartition(".")[2]


def driven():
    """The names of the architectures that StochCA drives, by what its documentation says."""
    return [name for name in timm.list_models() if module_of(name) in MODULES and name not in REFUSED]


def grouped(name):
    """Whether the blocks of an architecture are listed one by one, so that their number cannot be another."""
    return name.endswith("_sapiens2")


@contextlib.contextmanager
def without_memory():
    """Where models are made without numbers; older releases of timm read rates of blocks from a tensor."""
    on_cpu = functools.partial(torch.linspace, device="cpu")
    with torch.device("meta"), mock.patch.object(torch, "linspace", on_cpu):
        yield


@functools.cache
def outline(name):
    """An instance without numbers: as deep as it has to be, as wide as it is."""
    with without_memory():
        return timm.create_model(name, **({} if grouped(name) else {"depth": 2}))


def stride(name):
    """How many pixels a token is wide."""
    model = outline(name)
    embed = getattr(model, "patch_embed", None) or model.embeds
    return embed.feat_ratio(as_scalar=True)


def small(name, grid=(2, 3), **kwargs):
    """An instance of an architecture with few blocks, heads and tokens.

    Everything else is the architecture's own: size of the heads, norms, tokens, pooling, positions, MLP.

    Args:
        name: Of the architecture.
        grid: Patches of an image, downwards and to the right.
        kwargs: Go to `timm.create_model`, before what is made small.
    """
    model, pixels = outline(name), stride(name)
    attention = model.blocks[0].attn
    size = {"depth": 2, "num_classes": 5}
    if hasattr(model, "patch_embed"):
        size["img_size"] = tuple(n * pixels for n in grid)
    embed = getattr(model, "patch_embed", None)
    is_as_wide_as_its_stem = isinstance(embed, HybridEmbed) and isinstance(embed.proj, nn.Identity)
    if not is_as_wide_as_its_stem:
        size |= {"num_heads": 2, "embed_dim": 2 * attention.head_dim}
    if grouped(name):
        heads = [block.attn.num_kv_heads for block in model.blocks]
        size["num_kv_heads"] = tuple(2 * n // attention.num_heads for n in (max(heads), min(heads)))
    return timm.create_model(name, **{**size, **kwargs})


def images_for(name, grid=(2, 3), batch=2, dtype=torch.float32, seed=2):
    """Images of so many patches."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(batch, 3, *(n * stride(name) for n in grid), generator=generator).to(dtype)
