"""Target and source of a run, from the options that say where their weights come from."""

import copy
import os
from pathlib import Path
from typing import Any

from torch import Tensor
from tqdm import tqdm

from stochca.config import RecipeOptions
from stochca.vit import TimmViT
from stochca.weights.creation import create_vit
from stochca.weights.positions import resample_as_torchvision
from stochca.weights.projection import classify_after_projection
from stochca.weights.reading import Weights, read_weights


def create_pair(
    options: RecipeOptions, num_classes: int, *, keep_head: bool = False
) -> tuple[TimmViT, TimmViT | None]:
    """Create the models that the options describe.

    Args:
        options: Of the run.
        num_classes: Of the target's new classifier.
        keep_head: The source has the classifier of its weights.

    Returns:
        The target, and the source, None where that is to be a copy of the target.

    Raises:
        FileNotFoundError: No file of weights.
        ValueError: Weights or options do not fit.
        RuntimeError: timm has no such model, or no weights for it.
    """
    _check(options, keep_head)
    weights = _read("--pretrained-path", options.pretrained_path)
    source = _create_source(options, weights) if _has_own_source(options) else None
    needs_head = options.clip_projection or (keep_head and source is None)
    target = _create(
        options.model,
        weights,
        options,
        options.img_size,
        pretrained=options.pretrained,
        num_classes=None if needs_head else num_classes,
        drop_path_rate=options.drop_path,
    )
    if options.clip_projection:
        classify_after_projection(target, num_classes)
    elif needs_head:
        source = copy.deepcopy(target)
        target.reset_classifier(num_classes)
    return target, source


def _check(options: RecipeOptions, keep_head: bool) -> None:
    if options.pretrained_path is not None and not options.pretrained:
        raise ValueError(f"--no-pretrained leaves no use for --pretrained-path {options.pretrained_path}")
    if options.clip_projection and not options.pretrained:
        raise ValueError("--clip-projection needs pretrained weights, got --no-pretrained")
    if options.clip_projection and keep_head:
        raise ValueError("--clip-projection leaves the source no classifier, which one of --losses reads")
    names_none = options.source_model is None and options.source_path is None
    if options.source_img_size is not None and names_none and not options.pretrained:
        raise ValueError("--source-img-size needs pretrained weights, or --source-model or --source-path")


def _has_own_source(options: RecipeOptions) -> bool:
    given = options.source_model, options.source_path, options.source_img_size
    return any(value is not None for value in given)


def _create_source(options: RecipeOptions, target_weights: Weights | None) -> TimmViT:
    """The source that is no copy of the target, with the classifier of its weights."""
    weights = _read("--source-path", options.source_path)
    if options.source_model is None and weights is None:
        weights = target_weights
    name, size = options.source_model or options.model, options.source_img_size or options.img_size
    return _create(name, weights, options, size)


def _read(option: str, path: str | None) -> Weights | None:
    """The weights that an option names, if it does; says what they are."""
    if path is None:
        return None
    if not Path(path).is_file():
        raise FileNotFoundError(f"{option} {path} is not a file")
    weights = read_weights(path)
    if os.environ.get("RANK", "0") == "0":
        tqdm.write(weights.describe())
    return weights


def _create(
    name: str, weights: Weights | None, options: RecipeOptions, img_size: int | None, **kwargs: Any
) -> TimmViT:
    """A model for images of a size, its position embeddings resampled as the options say."""
    kwargs = {**options.model_kwargs, **kwargs, "eps": options.norm_eps}
    if img_size is None:
        return create_vit(name, weights, **kwargs)
    model = create_vit(name, weights, img_size=img_size, **kwargs)
    if options.pos_embed_interpolation == "torchvision":
        resample_as_torchvision(model, lambda: _positions(name, weights, kwargs))
    return model


def _positions(name: str, weights: Weights | None, kwargs: dict[str, Any]) -> Tensor:
    """The position embedding as the weights have it, which may be of another size than the model's own."""
    if weights is not None and kwargs.get("pretrained", True) and "pos_embed" in weights.state:
        return weights.state["pos_embed"]
    return create_vit(name, weights, **kwargs).pos_embed.data
