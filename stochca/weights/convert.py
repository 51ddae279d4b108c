"""`stochca convert`: a file of weights in any layout, written for timm or torchvision."""

from pathlib import Path
from typing import Any

import torch
from timm.data import resolve_data_config
from torch import nn

import stochca
from stochca.checkpoint import save_pickled, save_weights
from stochca.vit import TimmViT
from stochca.weights.creation import create_vit
from stochca.weights.facts import norm_eps
from stochca.weights.layouts import to_torchvision
from stochca.weights.options import ConvertOptions
from stochca.weights.reading import Weights, read_weights

_TORCHVISION_EPS = 1e-6


def convert(options: ConvertOptions) -> dict[str, Any]:
    """Read weights, load them strictly into their timm model, and write that model's.

    For timm it is a checkpoint as `stochca finetune` writes it, which `stochca evaluate` takes, in a
    safetensors file: its metadata name model, classes, normalisation and epsilon of the layer norms.

    Args:
        options: Of the command.

    Returns:
        `found`, what the file is, in words; `model`, `num_classes`, `norm_eps` and `output`.

    Raises:
        FileNotFoundError: No such file.
        FileExistsError: There is something at the output.
        ValueError: The file cannot be read, does not fit the model, or the model has parts that torchvision's
            has not.
    """
    output = Path(options.output)
    if output.exists():
        raise FileExistsError(f"--output {output} is there already")
    weights = read_weights(options.checkpoint)
    name, kwargs = _model_of(options, weights)
    try:
        model = create_vit(name, weights, eps=options.norm_eps, **kwargs)
    except (RuntimeError, TypeError) as error:
        raise ValueError(f"cannot create {name}: {error}") from error
    output.parent.mkdir(parents=True, exist_ok=True)
    if options.to == "torchvision":
        state, metadata = _torchvision_state(model), {"converted_from": weights.layout}
    else:
        state, metadata = model.state_dict(), _metadata(model, name, kwargs, weights)
    if output.suffix == ".safetensors":
        save_weights(output, state, metadata)
    else:
        save_pickled(output, state)
    found = {"found": weights.describe(), "model": name, "num_classes": model.num_classes}
    return {**found, "norm_eps": norm_eps(model), "output": str(output)}


def _model_of(options: ConvertOptions, weights: Weights) -> tuple[str, dict[str, Any]]:
    """Name and arguments of the timm model: those given, on top of what the file says."""
    facts = weights.facts
    name = options.model or facts.model
    if name is None:
        raise ValueError(f"--model is missing: {weights.path} does not say of which timm model it is")
    own = facts.model_kwargs if options.model is None else None
    size = {"img_size": options.img_size} if options.img_size else {}
    kwargs = {**(own or {}), **options.model_kwargs, **size}
    kwargs.pop("num_classes", None)  # the file's
    return name, kwargs


def _metadata(model: TimmViT, name: str, kwargs: dict[str, Any], weights: Weights) -> dict[str, Any]:
    """What `stochca finetune` writes, without what is of a run."""
    return {
        "stochca": stochca.__version__,
        "model": name,
        "model_kwargs": {**kwargs, "num_classes": model.num_classes},
        "norm_eps": norm_eps(model),
        "num_classes": model.num_classes,
        "classes": weights.facts.classes,
        "data_config": resolve_data_config({"img_size": kwargs.get("img_size")}, model=model),
        "step": 0,
        "metrics": None,
        "converted_from": weights.layout,
    }


def _torchvision_state(model: TimmViT) -> dict[str, torch.Tensor]:
    """The state dict of torchvision's model that computes the same."""
    eps, classifier = norm_eps(model), model.get_classifier()
    act = type(model.blocks[0].mlp.act).__name__
    for what, wanted, got in (
        ("pooling", "token", model.global_pool),
        ("activation functions", "GELU", act),
        ("an epsilon of layer norms", _TORCHVISION_EPS, eps),
        ("a position embedding for the class token", True, not getattr(model, "no_embed_class", False)),
        ("a classifier", True, isinstance(classifier, nn.Linear)),
    ):
        if wanted != got:
            raise ValueError(
                f"torchvision's VisionTransformer has {what}: wanted {wanted}, the model has {got}"
            )
    return to_torchvision(model.state_dict())
