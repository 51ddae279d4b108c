"""Compare a target with its source over images."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from stochca.analysis.attention import attention_measures, received
from stochca.analysis.heads import heads_of, layout_of
from stochca.analysis.measures import MEASURES
from stochca.analysis.moments import Estimate, Moments
from stochca.analysis.similarity import similarities
from stochca.vit import TimmViT, check_drivable, check_pair, image_size, renormalization


@dataclass(frozen=True)
class Measured:
    """One of `stochca.analysis.measures.MEASURES`, with standard deviations over images.

    Args:
        heads: `[blocks, heads]`.
        blocks: `[blocks]`, of the mean over an image's heads.
        model: `[]`, of the mean over an image's heads and blocks.
    """

    heads: Estimate
    blocks: Estimate
    model: Estimate


@dataclass(frozen=True)
class Comparison:
    """What a target has in common with its source.

    Args:
        images: How many were seen.
        measured: By the names of `stochca.analysis.measures.MEASURES`; those of the class token are left
            out where there is none.
    """

    images: int
    measured: dict[str, Measured]


def compare(
    target: TimmViT, source: TimmViT, batches: Iterable[Tensor | np.ndarray], *, attention: bool = True
) -> Comparison:
    """Compare queries, keys, values and attention of two models that each run alone on the same images.

    Queries, keys and values are those that enter attention, after their norms and rotary embeddings. All
    numbers are taken in float64 from what the models compute in their own precision, under the caller's
    autocast too.

    Args:
        target: A timm model that StochCA drives.
        source: One of the same architecture, on the same device; the heads may differ.
        batches: Images `[B, 3, H, W]`, normalised as the target's `pretrained_cfg` says; they are
            renormalised for a source that says otherwise.
        attention: Compare attention maps as well, which takes time in proportion to the squared number of
            tokens.

    Raises:
        TypeError: A model of a family that cannot be driven.
        ValueError: The models differ in architecture, or there are no images.
    """
    accumulated: dict[str, tuple[Moments, Moments, Moments]] = {}
    with paired(target, source) as pair:
        for batch in batches:
            for name, values in _per_image(pair, torch.as_tensor(batch), attention).items():
                levels = accumulated.setdefault(name, (Moments(), Moments(), Moments()))
                for moments, of_level in zip(
                    levels, (values, values.mean(2), values.mean((1, 2))), strict=True
                ):
                    moments.add(of_level)
    if not accumulated:
        raise ValueError("there are no images to compare target and source on")
    (first, *_), *_ = accumulated.values()
    measured = {
        name: Measured(*(moments.estimate() for moments in accumulated[name]))
        for name in MEASURES
        if name in accumulated
    }
    return Comparison(first.count, measured)


class Pair:
    """Two models that fit, and the images as each of them takes them."""

    def __init__(self, target: TimmViT, source: TimmViT) -> None:
        for model in (target, source):
            check_drivable(model)
        check_pair(target, source)
        sizes = image_size(target), image_size(source)
        if sizes[0] != sizes[1]:
            raise ValueError(
                "target and source are compared token by token, but take images of "
                f"{sizes[0]} and {sizes[1]} pixels"
            )
        self.target, self.source = target, source
        self._renormalization = renormalization(target, source)
        self._device = next(target.parameters()).device

    def images(self, batch: Tensor) -> tuple[Tensor, Tensor]:
        """A batch on the models' device, as the target and as the source takes it."""
        images = batch.to(self._device)
        if self._renormalization is None:
            return images, images
        factor, shift = images.new_tensor(self._renormalization)[..., None, None]
        return images, images * factor + shift


@contextmanager
def paired(target: TimmViT, source: TimmViT) -> Iterator[Pair]:
    """Check two models, and switch them to eval mode; their modes are restored.

    Raises:
        TypeError: A model of a family that cannot be driven.
        ValueError: The models differ in architecture.
    """
    pair = Pair(target, source)
    modes = [(model, model.training) for model in (target, source)]
    try:
        for model, _ in modes:
            model.eval()
        yield pair
    finally:
        for model, was_training in modes:
            model.train(was_training)


@torch.no_grad()
def attention_to_patches(pair: Pair, batch: Tensor, block: int) -> tuple[np.ndarray, np.ndarray]:
    """Where target and source look in one block: two maps `[B, rows, columns]` that each sum to 1.

    Args:
        pair: The models.
        batch: Images `[B, 3, H, W]`.
        block: Its index; negative ones count from the last.
    """
    images, for_source = pair.images(batch)
    layout = layout_of(pair.target, images)
    maps = []
    for model, seen in ((pair.target, images), (pair.source, for_source)):
        heads = list(heads_of(model, seen))[block]
        maps.append(received(heads, layout).unflatten(1, layout.grid).cpu().numpy())
    return maps[0], maps[1]


@torch.no_grad()
def _per_image(pair: Pair, batch: Tensor, attention: bool) -> dict[str, Tensor]:
    """All measures of a batch, `[B, blocks, heads]` each."""
    images, for_source = pair.images(batch)
    layout = layout_of(pair.target, images)
    blocks: dict[str, list[Tensor]] = {}
    for of_target, of_source in zip(
        heads_of(pair.target, images), heads_of(pair.source, for_source), strict=True
    ):
        found: dict[str, Any] = similarities(of_target, of_source, layout)
        if attention:
            found |= attention_measures(of_target, of_source, layout)
        for name, values in found.items():
            blocks.setdefault(name, []).append(values.cpu())
    return {name: torch.stack(values, dim=1) for name, values in blocks.items()}
