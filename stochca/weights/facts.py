"""What decides a model's output and is in none of its tensors, and where layouts keep it."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD, OPENAI_CLIP_MEAN, OPENAI_CLIP_STD
from torch import Tensor, nn

# Hugging Face's names of activation functions, as timm's classes are called.
_ACTIVATIONS = {
    "gelu": "GELU",
    "quick_gelu": "QuickGELU",
    "gelu_new": "GELUTanh",
    "gelu_fast": "GELUTanh",
    "gelu_pytorch_tanh": "GELUTanh",
}

# Of the state dict that OpenAI published, whose models are all trained with QuickGELU.
_OPENAI_ONLY = {"input_resolution", "context_length", "vocab_size"}


@dataclass(frozen=True)
class Facts:
    """What weights say of themselves, None where they do not.

    Args:
        norm_eps: Epsilon of the layer norms.
        num_heads: Of each block.
        activation: Class of the activation functions, by timm's name.
        mean: Of the pixels, per channel, 0 to 1.
        std: Of the pixels.
        classes: Their names.
        model: Name of the timm model.
        model_kwargs: Its arguments.
    """

    norm_eps: float | None = None
    num_heads: int | None = None
    activation: str | None = None
    mean: tuple[float, ...] | None = None
    std: tuple[float, ...] | None = None
    classes: list[str] | None = None
    model: str | None = None
    model_kwargs: dict[str, Any] | None = None


def facts_of(layout: str, state: Mapping[str, Tensor], path: Path, metadata: Mapping[str, str]) -> Facts:
    """Gather them from the layout, the file and the JSON files that are published beside it.

    Args:
        layout: Its name.
        state: The tensors, in that layout.
        path: Of the file.
        metadata: Of a safetensors file.

    Raises:
        ValueError: A file beside it is no JSON object, or names an activation function that timm has not.
    """
    if layout == "torchvision":
        return Facts(1e-6, activation="GELU", mean=IMAGENET_DEFAULT_MEAN, std=IMAGENET_DEFAULT_STD)
    if layout.startswith("Hugging Face"):
        return _of_hugging_face(path)
    if layout in ("OpenAI CLIP", "open_clip"):
        return _of_clip(layout, state, path)
    if "stochca" in metadata:
        return _of_ours(metadata)
    config = _read_json(path.with_name("config.json")).get("pretrained_cfg") or {}
    return Facts(mean=_numbers(config.get("mean")), std=_numbers(config.get("std")))


def norm_eps(model: nn.Module) -> float | None:
    """The epsilon that all layer norms of a model share; None where they do not."""
    found = {module.eps for module in model.modules() if isinstance(module, nn.LayerNorm)}
    return found.pop() if len(found) == 1 else None


def set_norm_eps(model: nn.Module, eps: float | None) -> None:
    """Give all layer norms of a model this epsilon; None leaves them as they are."""
    for module in model.modules():
        if isinstance(module, nn.LayerNorm) and eps is not None:
            module.eps = eps


def check_facts(model: Any, facts: Facts, where: str) -> None:
    """Raise a ValueError with both values where a model is not what weights were trained in."""
    for block in model.blocks[:1]:
        activation = getattr(block.mlp, "act", None)
        for what, wanted, got in (
            ("heads", facts.num_heads, block.attn.num_heads),
            ("activation function", facts.activation, activation and type(activation).__name__),
        ):
            if wanted is not None and got is not None and wanted != got:
                raise ValueError(f"{where} is of another model: {what}: the model has {got}, it has {wanted}")


def _of_hugging_face(path: Path) -> Facts:
    config = _read_json(path.with_name("config.json"))
    config = config.get("vision_config") or config
    images = _read_json(path.with_name("preprocessor_config.json"))
    activation = config.get("hidden_act")
    if activation is not None and activation not in _ACTIVATIONS:
        raise ValueError(
            f"hidden_act in {path.with_name('config.json')} must be one of {', '.join(_ACTIVATIONS)}, "
            f"got {activation}"
        )
    labels = config.get("id2label") or {}
    return Facts(
        config.get("layer_norm_eps"),
        config.get("num_attention_heads"),
        activation and _ACTIVATIONS[activation],
        _numbers(images.get("image_mean")),
        _numbers(images.get("image_std")),
        [labels[key] for key in sorted(labels, key=int)] or None,
    )


def _of_clip(layout: str, state: Mapping[str, Tensor], path: Path) -> Facts:
    config = _read_json(path.with_name("open_clip_config.json"))
    is_quick = (config.get("model_cfg") or {}).get("quick_gelu")
    if state.keys() >= _OPENAI_ONLY:
        is_quick = True
    images = config.get("preprocess_cfg") or {}
    is_own_tower = layout == "OpenAI CLIP"  # else timm's, whose models know their epsilon
    return Facts(
        1e-5 if is_own_tower else None,
        activation=None if is_quick is None or not is_own_tower else "QuickGELU" if is_quick else "GELU",
        mean=_numbers(images.get("mean")) or OPENAI_CLIP_MEAN,
        std=_numbers(images.get("std")) or OPENAI_CLIP_STD,
    )


def _of_ours(metadata: Mapping[str, str]) -> Facts:
    values = {
        name: json.loads(metadata.get(name, "null"))
        for name in ("model_kwargs", "classes", "data_config", "norm_eps")
    }
    images = values.pop("data_config") or {}
    return Facts(
        mean=_numbers(images.get("mean")),
        std=_numbers(images.get("std")),
        model=metadata.get("model"),
        **values,
    )


def _numbers(values: Any) -> tuple[float, ...] | None:
    return tuple(values) if values else None


def _read_json(path: Path) -> dict[str, Any]:
    """The object in a file; an empty one if there is no such file."""
    if not path.is_file():
        return {}
    try:
        found = json.loads(path.read_text())
    except ValueError as error:
        raise ValueError(f"{path} is no JSON: {error}") from error
    if not isinstance(found, dict):
        raise ValueError(f"{path} must hold a JSON object, got {found!r}")
    return found
