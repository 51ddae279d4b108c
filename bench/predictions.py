"""What the goals of the operator should come to on an H200, by arithmetic: a prediction, not a measurement.

`python -m bench.predictions` prints it. A pass takes as long as its arithmetic or its bytes, whichever is
more. Arithmetic is what the tiles compute, padding included, at one and the same share of the matrix rate for
every kernel of attention; bytes are what must cross device memory, and for the fused projection also the
cache. `python -m bench.kernels` replaces all of it by measurements.
"""

import sys
from collections.abc import Callable
from typing import NamedTuple

from bench.kernels.goals import GOALS
from bench.kernels.measure import Case
from bench.kernels.shapes import Shape
from stochca_kernels.tiles import TilePlan, cdiv, plans

# H200: dense bf16 product, device memory, and the cache, as a good kernel sees them.
MATMUL_FLOPS_PER_S = 790e12
MEMORY_BYTES_PER_S = 4.3e12
CACHE_BYTES_PER_S = 5.5e12
# What attention kernels reach of the first on the tiles they compute.
ATTENTION_SHARE = 0.5
# The tile of torch's flash and cuDNN kernels.
RIVAL_TILE = 128
BF16 = 2


class Times(NamedTuple):
    """Predicted seconds of a pass."""

    ours: float
    rival: float


def _padded(length: int, tile: int) -> int:
    return cdiv(length, tile) * tile


def _keys(kernel: str, shape: Shape) -> int:
    """Keys that a row of the tile table computes."""
    row = plans(kernel, "sm_90", "half", shape.head_dim, shape.length)[0]  # type: ignore[arg-type]
    plan = TilePlan(shape.length, row.block_n, row.smallest_part)
    return sum(plan.parts) or shape.length // row.block_n * row.block_n + plan.tail


def _attention(shape: Shape, products: float, rows: int, keys: int, tensors: float) -> float:
    """Time of `products` of `[rows, keys, D]` per head that move `tensors` times `[B, N, H, D]`."""
    flops = 2 * products * shape.batch * shape.heads * rows * keys * shape.head_dim
    moved = tensors * shape.batch * shape.length * shape.width * BF16
    return max(flops / (ATTENTION_SHARE * MATMUL_FLOPS_PER_S), moved / MEMORY_BYTES_PER_S)


def _rival(shape: Shape, products: float, tensors: float) -> float:
    side = _padded(shape.length, RIVAL_TILE)
    return _attention(shape, products, side, side, tensors)


def _product(shape: Shape, columns: int) -> float:
    """Time of a product of all tokens with `[C, columns]`."""
    tokens = shape.batch * shape.length
    flops = 2 * tokens * shape.width * columns
    moved = tokens * (shape.width + columns) * BF16
    return max(flops / MATMUL_FLOPS_PER_S, moved / MEMORY_BYTES_PER_S)


def forward(shape: Shape) -> Times:
    """Reads q, k, v, writes the output."""
    rows = _padded(shape.length, 64)
    return Times(_attention(shape, 2, rows, _keys("fwd", shape), 4), _rival(shape, 2, 4))


def target_and_source(shape: Shape) -> Times:
    """One launch over the rows of both, against two calls."""
    rows = _padded(2 * shape.length, 64)
    return Times(_attention(shape, 2, rows, _keys("fwd", shape), 6), 2 * _rival(shape, 2, 4))


def dq_alone(shape: Shape) -> Times:
    """Three products for dQ, against the five of a full backward."""
    ours = _attention(shape, 3, _padded(shape.length, 64), _keys("dq", shape), 6)
    return Times(ours, _rival(shape, 5, 8))


def backward(shape: Shape) -> Times:
    """Five products in one program, or three and four where they are split."""
    if plans("dqkv", "sm_90", "half", shape.head_dim, shape.length):
        ours = _attention(shape, 5, _padded(shape.length, 32), _keys("dqkv", shape), 8)
    else:
        side = _padded(shape.length, 64)
        ours = _attention(shape, 3, side, _keys("dq", shape), 6) + _attention(shape, 4, side, side, 6)
    return Times(ours, _rival(shape, 5, 8))


def class_row(shape: Shape, trains_tokens: bool) -> Times:
    """Tokens read once each way, against a product, attention over what it wrote, and both backwards."""
    tokens = shape.batch * shape.length * shape.width * BF16
    ours = (3 if trains_tokens else 2) * tokens / MEMORY_BYTES_PER_S
    attention = (2 + 4) * tokens / MEMORY_BYTES_PER_S  # k, v; then k, v again and their gradients
    products = _product(shape, 2 * shape.width) * (3 if trains_tokens else 1)
    return Times(ours, products + attention)


def fused_projection(shape: Shape, with_backward: bool) -> Times:
    """All tokens and one head's weight cross the cache for each head, against a product and our attention."""
    head = shape.length * shape.width + 2 * shape.head_dim * shape.width
    cache = shape.batch * shape.heads * head * BF16 / CACHE_BYTES_PER_S
    projection = max(cache, _product(shape, 2 * shape.width))
    attention = target_and_source(shape).ours
    product = _product(shape, 2 * shape.width)
    if not with_backward:
        return Times(projection + attention, product + attention)
    dq = dq_alone(shape)
    return Times(2 * projection + attention + dq.ours, product + attention + dq.ours)


MODELS: dict[tuple[str, str], Callable[[Shape], Times]] = {
    ("self", "forward"): forward,
    ("self", "backward"): backward,
    ("cross", "backward"): dq_alone,
    ("cross-with-source", "forward"): target_and_source,
    ("class-row-self", "forward+backward"): lambda shape: class_row(shape, trains_tokens=True),
    ("class-row-cross", "forward+backward"): lambda shape: class_row(shape, trains_tokens=False),
    ("projection-with-source", "forward"): lambda shape: fused_projection(shape, with_backward=False),
    ("projection-with-source", "forward+backward"): lambda shape: fused_projection(shape, with_backward=True),
}


def predict(case: Case) -> Times:
    """Predicted times of one case."""
    return MODELS[case.path.name, case.which](case.shape)


def rows() -> list[list[str]]:
    """Each case of each goal: what is to be reached, and what is predicted."""
    lines = []
    for goal in GOALS:
        for case in goal.cases:
            ours, rival = predict(case)
            verdict = "reached" if rival / ours >= goal.at_least else "missed"
            times = [f"{1e6 * seconds:.0f}" for seconds in (ours, rival)]
            ratios = [f"{rival / ours:.2f}", f"{goal.at_least:g}"]
            lines.append(
                [goal.text, f"{case.path.name} {case.which}", case.shape.name, *times, *ratios, verdict]
            )
    return lines


HEADER = ["goal", "case", "shape", "ours, us", "rival, us", "ratio", "goal is", "would be"]


def main() -> None:
    """Print the table."""
    for line in [HEADER, *rows()]:
        sys.stdout.write(f"{line[0]:85} " + " ".join(f"{field:>20}" for field in line[1:]) + "\n")


if __name__ == "__main__":
    main()
