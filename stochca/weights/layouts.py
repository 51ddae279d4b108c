"""Names of the tensors of a Vision Transformer in the layouts that timm does not read itself, as tables.

In a table `#` stands for the number of a block, and an entry is a tensor or the module that holds it.
"""

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

State = dict[str, Tensor]

# timm's name of each part of torchvision's VisionTransformer, the last two as files before 0.12 have them.
TORCHVISION = {
    "class_token": "cls_token",
    "encoder.pos_embedding": "pos_embed",
    "conv_proj": "patch_embed.proj",
    "encoder.layers.encoder_layer_#.ln_1": "blocks.#.norm1",
    "encoder.layers.encoder_layer_#.self_attention.in_proj_weight": "blocks.#.attn.qkv.weight",
    "encoder.layers.encoder_layer_#.self_attention.in_proj_bias": "blocks.#.attn.qkv.bias",
    "encoder.layers.encoder_layer_#.self_attention.out_proj": "blocks.#.attn.proj",
    "encoder.layers.encoder_layer_#.ln_2": "blocks.#.norm2",
    "encoder.layers.encoder_layer_#.mlp.0": "blocks.#.mlp.fc1",
    "encoder.layers.encoder_layer_#.mlp.3": "blocks.#.mlp.fc2",
    "encoder.ln": "norm",
    "heads.head": "head",
    "encoder.layers.encoder_layer_#.mlp.linear_1": "blocks.#.mlp.fc1",
    "encoder.layers.encoder_layer_#.mlp.linear_2": "blocks.#.mlp.fc2",
}

_HUGGING_FACE_BLOCK = {
    # As files have it.
    "attention.attention.query": "attn.q",
    "attention.attention.key": "attn.k",
    "attention.attention.value": "attn.v",
    "attention.output.dense": "attn.proj",
    "intermediate.dense": "mlp.fc1",
    "output.dense": "mlp.fc2",
    "layernorm_before": "norm1",
    "layernorm_after": "norm2",
    # As transformers 5 has it in memory, and DINOv2.
    "attention.q_proj": "attn.q",
    "attention.k_proj": "attn.k",
    "attention.v_proj": "attn.v",
    "attention.o_proj": "attn.proj",
    "mlp.fc1": "mlp.fc1",
    "mlp.fc2": "mlp.fc2",
    "norm1": "norm1",
    "norm2": "norm2",
    "layer_scale1.lambda1": "ls1.gamma",
    "layer_scale2.lambda1": "ls2.gamma",
}

# ViT, DeiT and DINOv2, without the prefix that a model with a head has.
HUGGING_FACE = {
    "embeddings.cls_token": "cls_token",
    "embeddings.distillation_token": "dist_token",
    "embeddings.register_tokens": "register_tokens",  # timm's own filter makes these two its own
    "embeddings.mask_token": "mask_token",
    "embeddings.position_embeddings": "pos_embed",
    "embeddings.patch_embeddings.projection": "patch_embed.proj",
    **{
        f"{block}.#.{part}": f"blocks.#.{timms}"
        for block in ("encoder.layer", "layers")
        for part, timms in _HUGGING_FACE_BLOCK.items()
    },
    "layernorm": "norm",
    "classifier": "head",
    "cls_classifier": "head",
    "distillation_classifier": "head_dist",
}

HUGGING_FACE_CLIP = {
    "vision_model.embeddings.class_embedding": "cls_token",
    "vision_model.embeddings.position_embedding.weight": "pos_embed",
    "vision_model.embeddings.patch_embedding": "patch_embed.proj",
    "vision_model.pre_layrnorm": "norm_pre",
    "vision_model.encoder.layers.#.self_attn.q_proj": "blocks.#.attn.q",
    "vision_model.encoder.layers.#.self_attn.k_proj": "blocks.#.attn.k",
    "vision_model.encoder.layers.#.self_attn.v_proj": "blocks.#.attn.v",
    "vision_model.encoder.layers.#.self_attn.out_proj": "blocks.#.attn.proj",
    "vision_model.encoder.layers.#.layer_norm1": "blocks.#.norm1",
    "vision_model.encoder.layers.#.layer_norm2": "blocks.#.norm2",
    "vision_model.encoder.layers.#.mlp.fc1": "blocks.#.mlp.fc1",
    "vision_model.encoder.layers.#.mlp.fc2": "blocks.#.mlp.fc2",
    "vision_model.post_layernorm": "norm",
    "visual_projection": "head",
}

_PATCHES = "embeddings.patch_embeddings.projection.weight"


@dataclass(frozen=True)
class Layout:
    """A way to name the tensors of a Vision Transformer.

    Args:
        name: What it is called in messages.
        fits: Whether a state dict with these names is one.
        convert: Returns the state dict that timm's own loading takes, and the names of what is left out.
    """

    name: str
    fits: Callable[[Mapping[str, Tensor]], bool]
    convert: Callable[[State], tuple[State, list[str]]]


def layout_of(state: Mapping[str, Tensor]) -> Layout:
    """The layout of a state dict, by its names; "timm" where timm's own loading has to know it."""
    return next(layout for layout in LAYOUTS if layout.fits(state))


def to_torchvision(state: State) -> State:
    """Rename a timm state dict for torchvision's `VisionTransformer`.

    Raises:
        ValueError: It has parts that torchvision's has not.
    """
    newest: dict[str, str] = {}
    for torchvisions, timms in TORCHVISION.items():
        newest.setdefault(timms, torchvisions)
    return _renamed(state, newest, "torchvision's VisionTransformer")


def _from_torchvision(state: State) -> tuple[State, list[str]]:
    return _renamed(state, TORCHVISION, "timm's"), []


def _from_hugging_face(state: State) -> tuple[State, list[str]]:
    prefix = next(name for name in state if name.endswith(_PATCHES)).removesuffix(_PATCHES)
    own = {name.removeprefix(prefix): tensor for name, tensor in state.items()}
    left_out = [name for name in own if name.startswith("pooler.")]
    if any("layer_scale1" in name for name in own):  # DINOv2 classifies mean and class token together
        left_out += [name for name in own if name.startswith("classifier.")]
    kept = {name: tensor for name, tensor in own.items() if name not in left_out}
    return _joined(_renamed(kept, HUGGING_FACE, "timm's")), left_out


def _from_hugging_face_clip(state: State) -> tuple[State, list[str]]:
    unused = {name for name in state if not name.startswith(("vision_model.", "visual_projection."))}
    unused |= {name for name in state if name.endswith("position_ids")}  # older files count them out
    kept = {name: tensor for name, tensor in state.items() if name not in unused}
    result = _joined(_renamed(kept, HUGGING_FACE_CLIP, "timm's"))
    result["cls_token"], result["pos_embed"] = result["cls_token"][None, None], result["pos_embed"][None]
    if "head.weight" in result:
        result["head.bias"] = torch.zeros(len(result["head.weight"]))  # timm's has one, as it makes its own
    return result, [name for name in state if name in unused]


def _as_it_is(state: State) -> tuple[State, list[str]]:
    return state, []


def _image_tower(state: State) -> tuple[State, list[str]]:
    """What timm's filter takes as it is, of which it leaves out the text tower."""
    return state, [name for name in state if not name.startswith("visual.")]


def _renamed(state: State, table: Mapping[str, str], whose: str) -> State:
    """Rename by a table; a tensor without an entry is a ValueError."""
    patterns = [
        (re.compile(re.escape(old).replace(r"\#", r"(\d+)") + r"(|\.weight|\.bias)"), new)
        for old, new in table.items()
    ]
    result, homeless = {}, []
    for name, tensor in state.items():
        for pattern, new in patterns:
            if match := pattern.fullmatch(name):
                *number, suffix = match.groups()
                result[new.replace("#", "".join(number)) + suffix] = tensor
                break
        else:
            homeless.append(name)
    if homeless:
        raise ValueError(f"{whose} has no place for {shortened(homeless)}")
    return result


def _joined(state: State) -> State:
    """Put the separate projections of queries, keys and values together."""
    result = {}
    for name, tensor in state.items():
        if match := re.fullmatch(r"(.*\.attn\.)([qkv])(\.weight|\.bias)", name):
            before, part, after = match.groups()
            if part == "q":
                parts = [state.get(f"{before}{part}{after}") for part in "qkv"]
                if any(other is None for other in parts):
                    raise ValueError(f"{before}q{after} has no k and v beside it")
                result[f"{before}qkv{after}"] = torch.cat([other for other in parts if other is not None])
        else:
            result[name] = tensor
    return result


def shortened(names: list[str]) -> str:
    """The first names of a list, and how many there are."""
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return ", ".join(names[:3]) + more


LAYOUTS = (
    Layout("torchvision", lambda state: "encoder.pos_embedding" in state, _from_torchvision),
    Layout("Hugging Face", lambda state: any(name.endswith(_PATCHES) for name in state), _from_hugging_face),
    Layout(
        "Hugging Face CLIP",
        lambda state: "vision_model.embeddings.class_embedding" in state,
        _from_hugging_face_clip,
    ),
    Layout("OpenAI CLIP", lambda state: "visual.class_embedding" in state, _image_tower),
    Layout("open_clip", lambda state: any(name.startswith("visual.trunk.") for name in state), _image_tower),
    Layout("timm", lambda state: True, _as_it_is),
)
