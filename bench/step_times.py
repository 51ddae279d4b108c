"""How long a training step should take on one H200, and what memory, by arithmetic: predictions, no timings.

Products take their FLOPs at a share of the matrix rate; attention is that of `bench.predictions`, padded
tiles included; all other kernels take the bytes that they move. Nothing overlaps, and launching is free: an
eager block needs some 50 launches of some 5 us each on the host, so that 12 blocks take no less than 3 ms,
which matters for small models at small batches alone. `bench.step` replaces all of it by measurements.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cache
from typing import Literal

from bench import predictions
from bench.cost import ALL_SAVINGS, BY_HAND, Part, Savings, Size, expected_parts, parts, plain_parts, work
from bench.kernels.shapes import Shape
from bench.predictions import MATMUL_FLOPS_PER_S, MEMORY_BYTES_PER_S

# What products of a ViT reach of the dense bf16 rate: large ones come to 0.8, those of width 768 to 0.7.
GEMM_SHARE = 0.75
# The rate of products in float32 without TF32, which run on CUDA cores: 67 TFLOP/s on paper.
FLOAT32_FLOPS_PER_S = 55e12
# A source in fp8: twice the rate on paper, less quantising what enters each product.
FP8_SPEEDUP = 1.6
# AdamW, fused, reads a weight, its gradient and two moments, and writes all but the gradient, in float32.
ADAMW_BYTES = 28
# Autocast reads float32 and writes bf16 for each weight that is used ...
CAST_BYTES = 6
# ... and the gradient of one that is trained comes back the same way.
CAST_GRADIENT_BYTES = 6
# Weights and two moments of the optimizer, in float32. Gradients appear as activations are freed.
STATE_BYTES = 12


@dataclass(frozen=True)
class Pointwise:
    """Bytes that kernels other than products and attention move, for each token and channel.

    Args:
        norm: A layer norm, with the cast of its output to the dtype of products.
        norm_backward: Its backward, with the casts and the sum into the gradient of the residual stream.
        residual: A branch added to the residual stream.
        residual_backward: The gradient of the branch, cast.
        activation: GELU, for each hidden channel.
        activation_backward: Its backward.
        bias_gradient: A sum over tokens, for each output of a linear layer.
        unpack: Gradients of q, k and v brought into one tensor.
        scale: LayerScale of one branch, where there is one.
        scale_backward: Its backward.
    """

    norm: int
    norm_backward: int
    residual: int
    residual_backward: int
    activation: int
    activation_backward: int
    bias_gradient: int
    unpack: int
    scale: int
    scale_backward: int


# Autocast: the residual stream and norms are float32, what enters and leaves products is bf16.
# Eager norm: 4 read, 4 written, cast 4 + 2. Its backward: cast 2 + 4, input 4 + 4 + 4, weight 4 + 4, sum 12.
EAGER = Pointwise(14, 38, 10, 6, 4, 6, 2, 12, 8, 20)
# Fused: a sum and the norm after it are one kernel, so are their backwards; the blocks meet in memory.
COMPILED = Pointwise(4, 22, 10, 0, 4, 6, 2, 12, 0, 4)
FLOAT32 = Pointwise(8, 32, 12, 0, 8, 12, 4, 24, 8, 16)

# Scores that lie in memory, bytes for each: written, scaled, softmax, read; and all of it in the backward.
SCORE_BYTES = {"float32": (24, 36), "bfloat16": (28, 36)}  # softmax is float32 under autocast, with casts
# Heads are moved apart before such products and together after, forward and backward: q, k, v and the output.
HEAD_COPY_BYTES = {"float32": (32, 32), "bfloat16": (16, 16)}


@dataclass(frozen=True)
class Provider:
    """Somebody who computes a step.

    Args:
        name: As in the tables.
        savings: What is left out; None for plain fine-tuning.
        pointwise: The kernels between products.
        attention: "ours"; torch's "sdpa"; or "scores", kept in memory.
        dtype: Of products.
        source_speedup: How much faster than the target's the source's products are.
        casts_source: Frozen weights are cast in every step, not once.
        kept: Bytes kept for the backward for each token and channel, of a block of the target: inputs of
            norms, of products and of attention. Attention's output is the input of a product.
        kept_hidden: The same for each token and hidden channel.
        recomputes: The backward computes outputs of norms and GELU again, and the source's keys and values.
    """

    name: str
    savings: Savings | None
    pointwise: Pointwise
    attention: Literal["ours", "sdpa", "scores"]
    dtype: Literal["bfloat16", "float32"] = "bfloat16"
    source_speedup: float = 1.0
    casts_source: bool = True
    kept: int = 20
    kept_hidden: int = 4
    recomputes: bool = False

    @property
    def matmul_flops_per_s(self) -> float:
        """Rate of the target's products."""
        return FLOAT32_FLOPS_PER_S if self.dtype == "float32" else GEMM_SHARE * MATMUL_FLOPS_PER_S


PLAIN_EAGER = Provider("plain eager", None, EAGER, "sdpa")
# A compiled backward computes norms and GELU again from their inputs, which alone are kept.
PLAIN = Provider("plain compiled", None, COMPILED, "sdpa", kept=16, kept_hidden=2)
# Who writes it by hand projects queries alone where a block reads the source, and casts the source once.
HAND_EAGER = Provider(
    "by hand eager", Savings(class_rows=False, full_source=True), EAGER, "sdpa", casts_source=False
)
HAND = replace(HAND_EAGER, name="by hand compiled", pointwise=COMPILED, kept=16, kept_hidden=2)
AUTHORS = Provider("authors fp32", BY_HAND, FLOAT32, "scores", "float32", kept=44, kept_hidden=8)
AUTHORS_BF16 = Provider("authors bf16", BY_HAND, EAGER, "scores", kept=26)
OURS_EAGER = Provider("ours eager", ALL_SAVINGS, replace(EAGER, unpack=0), "ours", casts_source=False)
OURS_RECOMPUTING = replace(OURS_EAGER, name="ours, recomputing", kept=16, kept_hidden=2, recomputes=True)
OURS = replace(
    OURS_EAGER, name="ours compiled", pointwise=replace(COMPILED, unpack=0), kept=16, kept_hidden=2
)
OURS_FP8 = replace(OURS, name="ours, fp8 source", source_speedup=FP8_SPEEDUP)
PROVIDERS = (PLAIN_EAGER, PLAIN, HAND, AUTHORS, AUTHORS_BF16, OURS_EAGER, OURS_RECOMPUTING, OURS, OURS_FP8)


def step_seconds(
    size: Size, batch: int, provider: Provider, coins: Sequence[bool], optimizer: bool = True
) -> float:
    """Predicted time of a training step under a draw of coins, which plain fine-tuning ignores."""
    done = parts_of(size, provider, coins)
    seconds = sum(times * part_seconds(size, batch, provider, part) for part, times in done.items())
    return seconds + weights_seconds(size, provider, optimizer)


def weights_seconds(size: Size, provider: Provider, optimizer: bool = True) -> float:
    """Predicted time of casting weights and gradients, and of the optimizer: the same under every draw."""
    return weights_bytes(size, provider, optimizer) / MEMORY_BYTES_PER_S


def weights_bytes(size: Size, provider: Provider, optimizer: bool = True) -> int:
    """Bytes that they move."""
    moved = ADAMW_BYTES * size.parameters if optimizer else 0
    if provider.dtype == "bfloat16":
        moved += (CAST_BYTES + CAST_GRADIENT_BYTES) * size.parameters
        moved += CAST_BYTES * size.parameters if provider.casts_source and provider.savings else 0
    return moved


@cache
def expected_seconds(size: Size, batch: int, provider: Provider, p: float) -> float:
    """Exact expectation over the coins of `step_seconds`."""
    savings = provider.savings
    done = plain_parts(size) if savings is None else expected_parts(size, p, savings)
    seconds = sum(times * part_seconds(size, batch, provider, part) for part, times in done.items() if times)
    return seconds + weights_seconds(size, provider)


@cache
def part_seconds(size: Size, batch: int, provider: Provider, part: Part) -> float:
    """Predicted time of one part of a step: its products, its attention, and what lies between."""
    products = batch * work(size, part, provider.savings or ALL_SAVINGS).gemm / provider.matmul_flops_per_s
    if part in (Part.SOURCE_STEM, Part.SOURCE, Part.SOURCE_KV):
        products /= provider.source_speedup
    if part is Part.CROSS and provider.recomputes:
        products += batch * work(size, Part.SOURCE_KV).gemm / provider.matmul_flops_per_s
    moved = batch * size.length * size.width * pointwise_bytes(size, provider, part)
    return products + moved / MEMORY_BYTES_PER_S + _attention_seconds(size, batch, provider, part)


def parts_of(size: Size, provider: Provider, coins: Sequence[bool]) -> Counter[Part]:
    """How many times somebody's step under a draw does each part."""
    return plain_parts(size) if provider.savings is None else parts(size, coins, provider.savings)


def pointwise_bytes(size: Size, provider: Provider, part: Part) -> float:
    """Bytes that kernels other than products and attention move, for each token and channel."""
    each, hidden, scaled = provider.pointwise, size.mlp_hidden / size.width, 2 * size.layer_scale
    forward = 2 * (each.norm + each.residual) + each.activation * hidden + each.scale * scaled
    backward = 2 * (each.norm_backward + each.residual_backward) + each.activation_backward * hidden
    backward += each.scale_backward * scaled
    if provider.recomputes:
        backward += 2 * each.norm + each.activation * hidden
    of_mlp_and_output = each.bias_gradient * (2 + hidden)
    whole = forward + backward + of_mlp_and_output + each.bias_gradient * 3 + each.unpack
    ends = each.norm + each.residual + each.norm_backward + each.residual_backward
    projects_own = provider.savings is None or provider.savings.own_kv
    return {
        Part.ENDS: ends,
        Part.SELF: whole,
        Part.CROSS: whole if projects_own else forward + backward + of_mlp_and_output + each.bias_gradient,
        Part.SELF_ROWS: each.norm * (2 if provider.recomputes else 1) + each.norm_backward,
        Part.CROSS_ROWS: 0,
        Part.SOURCE_STEM: each.residual,
        Part.SOURCE: forward,
        Part.SOURCE_KV: each.norm,
    }[part]


def _attention_seconds(size: Size, batch: int, provider: Provider, part: Part) -> float:
    shape = Shape("", batch, size.length, size.heads, size.head_dim)
    forward, backward = predictions.forward(shape), predictions.backward(shape)
    if provider.attention == "ours":
        of_part = {
            Part.SELF: forward.ours + backward.ours,
            Part.CROSS: forward.ours + predictions.dq_alone(shape).ours,
            Part.SELF_ROWS: predictions.class_row(shape, trains_tokens=True).ours,
            Part.CROSS_ROWS: predictions.class_row(shape, trains_tokens=False).ours,
            Part.SOURCE: forward.ours,
        }
    elif provider.attention == "sdpa":  # whose backward is the whole one in any case
        both = forward.rival + backward.rival
        of_part = {Part.SELF: both, Part.CROSS: both, Part.SOURCE: forward.rival}
    else:
        once, back = _scores_seconds(size, batch, provider)
        of_part = {Part.SELF: once + back, Part.CROSS: once + back, Part.SOURCE: once}
    return of_part.get(part, 0.0)


def _scores_seconds(size: Size, batch: int, provider: Provider) -> tuple[float, float]:
    """Forward and backward of attention whose scores lie in memory."""
    flops = 4 * batch * size.attention_width * size.length**2
    scores, numbers = batch * size.heads * size.length**2, batch * size.length * size.width
    moved = [
        of_score * scores + of_number * numbers
        for of_score, of_number in zip(
            SCORE_BYTES[provider.dtype], HEAD_COPY_BYTES[provider.dtype], strict=True
        )
    ]
    rate = provider.matmul_flops_per_s
    return flops / rate + moved[0] / MEMORY_BYTES_PER_S, 2 * flops / rate + moved[1] / MEMORY_BYTES_PER_S


def peak_bytes(size: Size, batch: int, provider: Provider, coins: Sequence[bool]) -> float:
    """Predicted peak memory of a step, without frozen weights: optimizer, weights, and what is kept.

    The peak is where the backward begins. What one block needs while it runs is left out.
    """
    done = parts_of(size, provider, coins)
    number = 4 if provider.dtype == "float32" else 2
    of_block = provider.kept + provider.kept_hidden * size.mlp_hidden / size.width
    of_part = {Part.SELF: of_block, Part.CROSS: of_block, Part.SELF_ROWS: 6, Part.CROSS_ROWS: 2}
    if provider.recomputes:  # of the source's pair its normalised tokens are kept
        of_part |= {Part.CROSS: of_block - number, Part.SELF_ROWS: 4}
    if provider.savings is not None and provider.savings.own_kv:
        of_part[Part.CROSS] = of_block + 2 * number  # the source's pair beside an own one
    kept = size.length * size.width * sum(of_part.get(part, 0.0) * times for part, times in done.items())
    kept += number * size.num_patches * size.patch_inputs
    if provider.attention == "scores":  # probabilities, as often as they are cast; and q, k, v of the source
        kept += size.depth * size.heads * size.length**2 * (4 if provider.dtype == "float32" else 6)
        kept += size.depth * size.length * size.width * 3 * number
    weights = STATE_BYTES + (2 if provider.dtype == "bfloat16" else 0)
    return batch * kept + weights * size.parameters
