"""Small models of torchvision and of OpenAI's layout, with weights that matter."""

from collections.abc import Mapping

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torchvision.models import VisionTransformer

from tests.models import perturb

SIZES = {"img_size": 24, "patch_size": 8, "depth": 2, "embed_dim": 48, "num_heads": 3}
NAME = "vit_tiny_patch16_224"
CLIP_NAME = "vit_base_patch16_clip_quickgelu_224.openai"
CLASSES = 5
HUGGING_FACE = {
    "image_size": 24,
    "patch_size": 8,
    "num_hidden_layers": 2,
    "hidden_size": 48,
    "num_attention_heads": 3,
    "intermediate_size": 192,
}


def make_images(size=24):
    # Dark ones, whose tokens vary little enough for the epsilon of a norm to show.
    return 1e-3 * torch.randn(4, 3, size, size, generator=torch.Generator().manual_seed(0))


@torch.no_grad()
def logits(model, images):
    result = model.eval()(images)
    return getattr(result, "logits", result)


def torchvision_vit(**changes):
    sizes = {"image_size": 24, "patch_size": 8, "num_layers": 2, "num_heads": 3, "hidden_dim": 48}
    model = VisionTransformer(**{**sizes, "mlp_dim": 192, "num_classes": CLASSES, **changes})
    perturb(model)
    return model


def openai_state(width=48, depth=2, patches=9, patch=8, embed=24, *, is_openai=True):
    """The state dict of OpenAI's CLIP: an image tower, a text tower and what its file alone has."""
    generator = torch.Generator().manual_seed(0)

    def random(*shape):
        return 0.2 * torch.randn(shape, generator=generator)

    state = {
        "visual.class_embedding": random(width),
        "visual.positional_embedding": random(patches + 1, width),
        "visual.proj": random(width, embed),
        "visual.conv1.weight": random(width, 3, patch, patch),
        "transformer.resblocks.0.ln_1.weight": random(16),
        "logit_scale": random(),
    }
    modules = {"visual.ln_pre": (width,), "visual.ln_post": (width,)}
    for block in range(depth):
        prefix = f"visual.transformer.resblocks.{block}"
        state[f"{prefix}.attn.in_proj_weight"] = random(3 * width, width)
        state[f"{prefix}.attn.in_proj_bias"] = random(3 * width)
        modules |= {
            f"{prefix}.ln_1": (width,),
            f"{prefix}.ln_2": (width,),
            f"{prefix}.attn.out_proj": (width, width),
            f"{prefix}.mlp.c_fc": (4 * width, width),
            f"{prefix}.mlp.c_proj": (width, 4 * width),
        }
    for name, shape in modules.items():
        state[f"{name}.weight"], state[f"{name}.bias"] = random(*shape), random(shape[0])
    if is_openai:
        state |= {name: torch.tensor(77) for name in ("input_resolution", "context_length", "vocab_size")}
    return state


@torch.no_grad()
def openai_features(state, images, heads=3):
    """What OpenAI's image tower computes, written out."""
    state = {name.removeprefix("visual."): t for name, t in state.items() if name.startswith("visual.")}
    width = len(state["class_embedding"])

    def norm(x, name):
        return F.layer_norm(x, (width,), state[f"{name}.weight"], state[f"{name}.bias"], eps=1e-5)

    def linear(x, name):
        return F.linear(x, state[f"{name}.weight"], state[f"{name}.bias"])

    patches = F.conv2d(images, state["conv1.weight"], stride=state["conv1.weight"].shape[-1])
    classes = state["class_embedding"].expand(len(images), 1, width)
    x = torch.cat([classes, patches.flatten(2).transpose(1, 2)], dim=1) + state["positional_embedding"]
    x = norm(x, "ln_pre")
    for block in range(2):
        prefix = f"transformer.resblocks.{block}"
        y = norm(x, f"{prefix}.ln_1")
        qkv = F.linear(y, state[f"{prefix}.attn.in_proj_weight"], state[f"{prefix}.attn.in_proj_bias"])
        q, k, v = qkv.unflatten(2, (3, heads, width // heads)).permute(2, 0, 3, 1, 4)
        y = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        x = x + linear(y, f"{prefix}.attn.out_proj")
        y = linear(norm(x, f"{prefix}.ln_2"), f"{prefix}.mlp.c_fc")
        x = x + linear(y * torch.sigmoid(1.702 * y), f"{prefix}.mlp.c_proj")
    return norm(x[:, 0], "ln_post") @ state["proj"]


def as_jax(state: Mapping[str, Tensor]) -> dict[str, np.ndarray]:
    """A timm state dict by the names and in the shapes of Google's files."""
    heads, width = SIZES["num_heads"], SIZES["embed_dim"]
    arrays = {
        "cls": state["cls_token"],
        "embedding/kernel": state["patch_embed.proj.weight"].permute(2, 3, 1, 0),
        "embedding/bias": state["patch_embed.proj.bias"],
        "Transformer/posembed_input/pos_embedding": state["pos_embed"],
        "Transformer/encoder_norm/scale": state["norm.weight"],
        "Transformer/encoder_norm/bias": state["norm.bias"],
        "head/kernel": state["head.weight"].T,
        "head/bias": state["head.bias"],
    }
    for i in range(SIZES["depth"]):
        ours, theirs = f"blocks.{i}", f"Transformer/encoderblock_{i}"
        attention = f"{theirs}/MultiHeadDotProductAttention_1"
        qkv = state[f"{ours}.attn.qkv.weight"].reshape(3, heads, width // heads, width).permute(0, 3, 1, 2)
        biases = state[f"{ours}.attn.qkv.bias"].reshape(3, heads, width // heads)
        for name, weight, bias in zip(("query", "key", "value"), qkv, biases, strict=True):
            arrays[f"{attention}/{name}/kernel"], arrays[f"{attention}/{name}/bias"] = weight, bias
        out = state[f"{ours}.attn.proj.weight"].T.reshape(heads, width // heads, width)
        arrays[f"{attention}/out/kernel"] = out
        arrays[f"{attention}/out/bias"] = state[f"{ours}.attn.proj.bias"]
        for norm, name in (("norm1", "LayerNorm_0"), ("norm2", "LayerNorm_2")):
            arrays[f"{theirs}/{name}/scale"] = state[f"{ours}.{norm}.weight"]
            arrays[f"{theirs}/{name}/bias"] = state[f"{ours}.{norm}.bias"]
        for r in range(2):
            arrays[f"{theirs}/MlpBlock_3/Dense_{r}/kernel"] = state[f"{ours}.mlp.fc{r + 1}.weight"].T
            arrays[f"{theirs}/MlpBlock_3/Dense_{r}/bias"] = state[f"{ours}.mlp.fc{r + 1}.bias"]
    return {name: tensor.numpy().copy() for name, tensor in arrays.items()}
