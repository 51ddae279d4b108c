"""Bytes that a training step moves through device memory, counted on paper: each kernel's reads and writes.

A product reads both factors and writes what comes out, once; attention is counted as in `bench.predictions`,
all else as in `bench.step_times`. Nothing is expected to stay in a cache between two kernels.
"""

from collections.abc import Sequence
from statistics import fmean

from bench.cost import Part, Size
from bench.step_times import (
    HEAD_COPY_BYTES,
    SCORE_BYTES,
    Provider,
    parts_of,
    pointwise_bytes,
    weights_bytes,
)

# Tensors [B, N, C] that attention moves: q, k, v and the output; in the backward also its gradients.
FORWARD, DQ, BACKWARD = 4, 6, 8
# Times that attention of class rows reads all tokens: it computes neither k nor v.
ROWS_THAT_TRAIN_TOKENS, ROWS = 3, 2


def expected_bytes(size: Size, batch: int, provider: Provider, draws: Sequence[Sequence[bool]]) -> float:
    """Mean over some draws of `step_bytes`."""
    return fmean(step_bytes(size, batch, provider, coins) for coins in draws)


def step_bytes(size: Size, batch: int, provider: Provider, coins: Sequence[bool]) -> float:
    """Bytes of a step under a draw of coins, casts of weights and the optimizer included."""
    done = parts_of(size, provider, coins)
    moved = sum(times * part_bytes(size, batch, provider, part) for part, times in done.items())
    return moved + weights_bytes(size, provider)


def part_bytes(size: Size, batch: int, provider: Provider, part: Part) -> float:
    """Bytes of one part of a step."""
    between = batch * size.length * size.width * pointwise_bytes(size, provider, part)
    return (
        between + _product_bytes(size, batch, provider, part) + _attention_bytes(size, batch, provider, part)
    )


def _product_bytes(size: Size, batch: int, provider: Provider, part: Part) -> float:
    """A trained layer has three products: its output, the gradient of its input and that of its weight."""
    width, inner, hidden = size.width, size.attention_width, size.mlp_hidden
    after = [(inner, width), (width, hidden), (hidden, width)]
    whole, query, pair = [(width, 3 * inner), *after], [(width, inner), *after], [(width, 2 * inner)]
    own = provider.savings is not None and provider.savings.own_kv
    tokens, rows, patches = batch * size.length, batch * (size.class_rows or 0), batch * size.num_patches
    embedding = [(size.patch_inputs, width)]
    of_part = {
        Part.ENDS: _layers(embedding, patches, 2) + _layers([(width, size.num_classes)], batch, 3),
        Part.SELF: _layers(whole, tokens, 3),
        Part.CROSS: _layers(whole if own else query, tokens, 3),
        Part.SELF_ROWS: _layers(query, rows, 3),
        Part.CROSS_ROWS: _layers(query, rows, 3),
        Part.SOURCE_STEM: _layers(embedding, patches, 1),
        Part.SOURCE: _layers(whole, tokens, 1),
        Part.SOURCE_KV: _layers(pair, tokens, 1),
    }
    again = _layers(pair, tokens, 1) if part is Part.CROSS and provider.recomputes else 0
    return _number_bytes(provider) * (of_part[part] + again)


def _layers(shapes: Sequence[tuple[int, int]], rows: int, products: int) -> int:
    """Numbers in the three matrices of each product."""
    return products * sum(rows * (inputs + outputs) + inputs * outputs for inputs, outputs in shapes)


def _attention_bytes(size: Size, batch: int, provider: Provider, part: Part) -> float:
    numbers = batch * size.length * size.attention_width
    if provider.attention == "scores":
        scores = batch * size.heads * size.length**2
        forward, both = (
            of_scores * scores + of_heads * numbers
            for of_scores, of_heads in zip(
                _cumulated(SCORE_BYTES[provider.dtype]),
                _cumulated(HEAD_COPY_BYTES[provider.dtype]),
                strict=True,
            )
        )
        return {Part.SELF: both, Part.CROSS: both, Part.SOURCE: forward}.get(part, 0.0)
    of_part = {
        Part.SELF: FORWARD + BACKWARD,
        Part.CROSS: FORWARD + (DQ if provider.attention == "ours" else BACKWARD),
        Part.SELF_ROWS: ROWS_THAT_TRAIN_TOKENS,
        Part.CROSS_ROWS: ROWS,
        Part.SOURCE: FORWARD,
    }
    return _number_bytes(provider) * numbers * of_part.get(part, 0)


def _cumulated(forward_and_backward: tuple[int, int]) -> tuple[int, int]:
    forward, backward = forward_and_backward
    return forward, forward + backward


def _number_bytes(provider: Provider) -> int:
    return 4 if provider.dtype == "float32" else 2
