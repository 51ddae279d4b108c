"""One architecture of each family that the conditions of timm's tests are put on, in both ways to use it."""

import copy
import functools

import torch

from stochca import StochCA, StochCAAttention
from tests.architectures import small
from tests.models import perturb

FAMILIES = {
    "class-token": "deit3_small_patch16_224",
    "two-heads": "deit_small_distilled_patch16_224",
    "pre-norm": "vit_base_patch16_clip_224",
    "registers": "vit_small_patch14_reg4_dinov2",
    "average": "vit_medium_patch16_gap_240",
    "attention-pool": "vit_base_patch16_siglip_224",
    "naflex": "naflexvit_base_patch16_gap",
    "rotary": "eva02_small_patch14_224",
    "rotary-registers": "vit_small_patch16_dinov3",
    "mixed-rotary": "vit_small_patch16_rope_mixed_224",
}
ROTARY = [family for family in FAMILIES if "rotary" in family]  # which take no attention layer
COINS = (True, False, True)


@functools.cache
def _made(family, **kwargs):
    torch.manual_seed(0)
    model = small(FAMILIES[family], depth=len(COINS), **kwargs)
    perturb(model)
    return model


def make_timms(family, **kwargs):
    """timm's own model, far enough from its initialisation."""
    return copy.deepcopy(_made(family, **kwargs))


def make_stochca(family, **kwargs):
    """StochCA with another source than target, of the weights of `make_timms`."""
    target = make_timms(family, **kwargs)
    source = copy.deepcopy(target)
    perturb(source, seed=1)
    return StochCA(target, source, p=0.5)


def make_with_layer(family, **kwargs):
    """timm's model with StochCA's attention, of the weights of `make_timms`."""
    return make_timms(family, attn_layer=StochCAAttention, **kwargs)


BOTH = [(make_stochca, family) for family in FAMILIES] + [
    (make_with_layer, family) for family in FAMILIES if family not in ROTARY
]
IDS = [f"{make.__name__.removeprefix('make_')}-{family}" for make, family in BOTH]


def joined(out):
    """Logits of a model, those of two heads one after the other."""
    return torch.cat(out) if isinstance(out, tuple) else out
