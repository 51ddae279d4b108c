"""Attention maps of target and source: how much they differ, and how far they reach."""

import math

import torch
from torch import Tensor

from stochca.analysis.heads import Heads, Layout
from stochca.analysis.similarity import float64


def scores(heads: Heads) -> Tensor:
    """What the softmax is taken of, in float64: `[B, H, N, N]`, rows ask."""
    return float64(heads.q) @ float64(heads.k).transpose(-2, -1) * heads.scale


def jensen_shannon(p: Tensor, q: Tensor) -> Tensor:
    r"""Jensen-Shannon divergence of distributions `[..., N]`, in bits: `[...]`, from 0 to 1.

    :math:`H((p + q) / 2) - (H(p) + H(q)) / 2`, with the entropy H to base 2.
    """

    def entropy(distribution: Tensor) -> Tensor:
        return torch.special.entr(distribution).sum(-1) / math.log(2)

    # Of equal distributions, rounding may leave it below zero.
    return (entropy((p + q) / 2) - (entropy(p) + entropy(q)) / 2).clamp(0, 1)


def mean_distance(attention: Tensor, distances: Tensor) -> Tensor:
    """Mean distance that patches attend over.

    Args:
        attention: `[..., P, P]`, each row a distribution over the patches.
        distances: `[P, P]`.

    Returns:
        `[...]`, the mean over rows, in the unit of the distances.
    """
    return (attention * distances).sum(-1).mean(-1)


def attention_measures(target: Heads, source: Heads, layout: Layout) -> dict[str, Tensor]:
    """What is measured of the attention, by the names of `MEASURES`: `[B, H]` each."""
    # One image at a time: maps of a batch are many times as large as its tokens.
    images = [_of_one_image(*pair, layout) for pair in zip(_images(target), _images(source), strict=True)]
    return {name: torch.stack([image[name] for image in images]) for name in images[0]}


def received(heads: Heads, layout: Layout) -> Tensor:
    """Attention that patches get from the class token, else from all patches: `[B, P]`, mean over heads."""
    among = scores(heads)[..., layout.num_prefix :]
    asking = among[:, :, :1] if layout.has_class else among
    return asking.softmax(-1).mean((1, 2))


def _images(heads: Heads) -> list[Heads]:
    q, k, v, scale = heads
    return [Heads(*parts, scale) for parts in zip(q, k, v, strict=True)]


def _of_one_image(target: Heads, source: Heads, layout: Layout) -> dict[str, Tensor]:
    """Of queries, keys and values `[H, N, D]`: `[H]` each."""
    logits, source_logits = scores(target), scores(source)
    patches = slice(layout.num_prefix, None)

    def divergence(rows: slice, columns: slice) -> Tensor:
        maps = (s[:, rows, columns].softmax(-1) for s in (logits, source_logits))
        return jensen_shannon(*maps).mean(-1)

    def distance(s: Tensor) -> Tensor:
        return mean_distance(s[:, patches, patches].softmax(-1), layout.distances)

    everything = slice(None)
    result = {"attention_divergence": divergence(everything, everything)}
    if layout.has_class:
        result["class_attention_divergence"] = divergence(slice(1), patches)
    return result | {
        "attention_distance_target": distance(logits),
        "attention_distance_source": distance(source_logits),
    }
