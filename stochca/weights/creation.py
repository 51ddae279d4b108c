"""timm models with the weights of a file, strictly: every tensor of the model, and no other."""

import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import timm
from torch import Tensor, nn

from stochca.vit import TimmViT
from stochca.weights.facts import check_facts, set_norm_eps
from stochca.weights.intact import check_numbers
from stochca.weights.reading import JAX, Weights, read_weights

LOCAL = "local-dir:"

# Arguments of `timm.create_model` that have it load files, which no file of weights may ask for.
_LOADING = ("pretrained", "pretrained_cfg", "pretrained_cfg_overlay", "checkpoint_path", "cache_dir")

# In a folder of timm; the first that is there is read, as timm does it.
_FILES = ("model.safetensors", "pytorch_model.bin", "pytorch_model.pth", "model.pth")

# What JAX files have and the models may not, or in another size.
_JAX_OTHERS = ("head/", "pre_logits/", "embedding/kernel", "pos_embedding")
_OTHERS = ("head.", "patch_embed.proj.weight", "pos_embed")


def create_vit(
    name: str,
    weights: Weights | None = None,
    *,
    pretrained: bool = True,
    num_classes: int | None = None,
    eps: float | None = None,
    **kwargs: Any,
) -> TimmViT:
    """Create a timm model with pretrained weights.

    timm loads leniently as soon as the number of classes is another one. Here the model has the classes of
    the file while it is loaded, and a new classifier afterwards. Position embeddings are resampled by timm
    where `img_size` is another one than that of the weights.

    Args:
        name: Of the model.
        weights: Those of a file; None for those that timm knows by the model's name.
        pretrained: Load any at all.
        num_classes: None keeps the classifier of the weights. As many as they have keep it too.
        eps: Epsilon of the layer norms, for weights that do not say it.
        kwargs: Go to `timm.create_model`.

    Returns:
        The model, whose `pretrained_cfg` has the normalisation that the file names.

    Raises:
        ValueError: The file does not fit the model, in what and how.
        RuntimeError: timm has no such model, or no weights for it.
    """
    if weights is None and pretrained and name.startswith(LOCAL):  # where timm loads as leniently
        weights = _of_folder(Path(name.removeprefix(LOCAL)))
    if pretrained and weights is not None and weights.layout == JAX:
        model = _load_jax(name, weights, num_classes, **kwargs)
        set_norm_eps(model, eps)
        return model
    if not pretrained or weights is None:
        if num_classes is not None:
            kwargs["num_classes"] = num_classes
        model = timm.create_model(name, pretrained=pretrained, **kwargs)
        if pretrained and weights is None:
            _check_quick_gelu(name, model)
        set_norm_eps(model, eps)
        return model
    model = _load(name, weights, **kwargs)
    check_facts(model, weights.facts, str(weights.path))
    set_norm_eps(model, _resolve_eps(weights, eps))
    if num_classes not in (None, weights.num_classes):
        model.reset_classifier(num_classes)
    return model


def create_plain(description: Mapping[str, Any]) -> nn.Module:
    """The timm model that a checkpoint of ours fits, with random weights.

    Args:
        description: `model`, `model_kwargs` and `norm_eps`, as the metadata of the checkpoint have them.

    Raises:
        ValueError: The arguments would load a file.
    """
    if refused := [name for name in _LOADING if name in description["model_kwargs"]]:
        raise ValueError(f"model_kwargs of a checkpoint must not load other files, got {', '.join(refused)}")
    model = timm.create_model(description["model"], **description["model_kwargs"])
    set_norm_eps(model, description.get("norm_eps"))
    return model


def _load(name: str, weights: Weights, **kwargs: Any) -> TimmViT:
    """The model with the classes and the normalisation of the weights."""
    facts = weights.facts
    images = {key: value for key, value in (("mean", facts.mean), ("std", facts.std)) if value is not None}
    # Of "local-dir" timm would read the file itself.
    overlay = {"state_dict": weights.state, "num_classes": weights.num_classes, "source": "timm", **images}
    classes = {"num_classes": weights.num_classes}
    try:
        model = timm.create_model(name, pretrained=True, pretrained_cfg_overlay=overlay, **classes, **kwargs)
    except RuntimeError as error:
        raise ValueError(f"{weights.path} does not fit {name}: {_problems(error)}") from error
    del model.pretrained_cfg["state_dict"]
    _check_patches(model, weights)
    _check_kinds(model, weights)
    return model


def _of_folder(folder: Path) -> Weights:
    """The weights in a folder of timm.

    Raises:
        FileNotFoundError: There are none.
    """
    found = [folder / file for file in _FILES if (folder / file).is_file()]
    if not found:
        raise FileNotFoundError(f"{LOCAL}{folder} has none of {', '.join(_FILES)}")
    return read_weights(found[0])


def _load_jax(name: str, weights: Weights, num_classes: int | None, **kwargs: Any) -> TimmViT:
    """The model with JAX weights, by timm's loader: all of them, in their own shapes.

    Raises:
        ValueError: The file is not one, or does not fit.
    """
    kwargs["pretrained_cfg_overlay"] = {"file": str(weights.path), "custom_load": True}
    if num_classes is not None:
        kwargs["num_classes"] = num_classes
    try:
        model = timm.create_model(name, pretrained=True, **kwargs)
        with np.load(weights.path, allow_pickle=False) as file:
            sizes = {key: file[key].size for key in file.files}
    except (KeyError, IndexError, RuntimeError, ValueError, EOFError, zipfile.BadZipFile) as error:
        raise ValueError(f"{weights.path} does not fit {name}: {error}") from error
    # What timm finds it copies, also where one number would have to do for a whole row.
    own = sum(size for key, size in sizes.items() if not any(other in key for other in _JAX_OTHERS))
    wanted = sum(p.numel() for key, p in model.named_parameters() if not key.startswith(_OTHERS))
    if own != wanted:
        raise ValueError(
            f"{weights.path} does not fit {name}: beside patches, positions and head it has {own} numbers, "
            f"the model has {wanted}"
        )
    if num_classes is None and model.num_classes and not any("head/bias" in key for key in sizes):
        raise ValueError(f"{weights.path} does not fit {name}: it has no head")
    check_numbers(model.state_dict(), str(weights.path))
    return model


def _check_kinds(model: TimmViT, weights: Weights) -> None:
    """Refuse whole numbers where real ones belong, as quantised weights have them: torch would convert."""
    for name, tensor in model.state_dict().items():
        came = weights.state.get(name, tensor)
        if isinstance(came, Tensor) and came.is_floating_point() != tensor.is_floating_point():
            raise ValueError(f"{weights.path} does not fit: {name} is {came.dtype}, wanted {tensor.dtype}")


def _resolve_eps(weights: Weights, eps: float | None) -> float | None:
    """The file's epsilon, else the one given."""
    own = weights.facts.norm_eps
    if own is None and eps is None and weights.layout.startswith("Hugging Face"):
        raise ValueError(
            f"{weights.path} is a Hugging Face file, which does not say the epsilon of its layer norms: put "
            "its config.json beside it, or give --norm-eps (1e-12 is the default of their ViT)"
        )
    if None not in (own, eps) and own != eps:
        raise ValueError(f"--norm-eps is {eps}, but the layer norms of {weights.path} have {own}")
    return eps if own is None else own


def _check_quick_gelu(name: str, model: TimmViT) -> None:
    """Refuse weights whose notes in timm say that they are for the other variant of the model."""
    is_quick = any("quickgelu" in note.lower() for note in model.pretrained_cfg.get("notes") or ())
    got = type(model.blocks[0].mlp.act).__name__ if is_quick else "QuickGELU"
    if got != "QuickGELU":
        raise ValueError(
            f"the weights of {name} were trained with QuickGELU, the model has {got}: take "
            + name.replace("_clip_", "_clip_quickgelu_")
        )


def _check_patches(model: TimmViT, weights: Weights) -> None:
    """Refuse filters of another size, which timm resamples: that makes another model of them."""
    wanted = getattr(model, "patch_embed", None) and tuple(model.patch_embed.proj.weight.shape[2:])
    filters = weights.state.get("patch_embed.proj.weight", weights.state.get("visual.conv1.weight"))
    got = None if filters is None else tuple(filters.shape[2:])  # none of a linear layer's
    if wanted and got and got != wanted:
        raise ValueError(f"{weights.path} is of another patch size: the model has {wanted}, it has {got}")


def _problems(error: RuntimeError) -> str:
    """What torch says of a state dict that does not fit, in one line."""
    first, *others = [line.strip() for line in str(error).splitlines()]
    shown = [line if len(line) < 200 else f"{line[:200]} ..." for line in others[:3] or [first]]
    return " ".join(shown) + " ..." * (len(others) > 3)
