"""The work of one training step on paper: FLOPs of a timm ViT under a draw of coins, and their expectation.

A step is a handful of parts, each done so many times; the draw decides how many times. FLOPs are those that
torch's `FlopCounterMode` counts, forward and backward, for one image (`bench.counts` counts them by running).
"""

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from enum import Enum
from functools import cache
from math import comb
from typing import NamedTuple, TypeAlias

import numpy as np
from timm.layers import Mlp
from timm.models.deit import VisionTransformerDistilled
from timm.models.vision_transformer import VisionTransformer
from torch import nn

from stochca import StepPlan
from stochca.vit import num_class_rows

Draw: TypeAlias = tuple[bool, ...]

CANDIDATES = 1024


@dataclass(frozen=True)
class Size:
    """What the work of a ViT depends on.

    Args:
        depth: Number of blocks, L.
        width: C.
        heads: H.
        head_dim: D.
        length: Tokens N of an image, the class token included.
        mlp_hidden: Hidden width of the MLP.
        patch_inputs: Numbers in a patch: channels x height x width.
        num_patches: Patches of an image.
        num_classes: Outputs of the head; 0 for none.
        class_rows: First tokens that the head reads, None where it reads all.
        parameters: Of the whole model.
        block_parameters: Of one block.
        layer_scale: Each branch is multiplied by a learned factor per channel.
    """

    depth: int
    width: int
    heads: int
    head_dim: int
    length: int
    mlp_hidden: int
    patch_inputs: int
    num_patches: int
    num_classes: int
    class_rows: int | None
    parameters: int
    block_parameters: int
    layer_scale: bool

    @property
    def attention_width(self) -> int:
        """Width of the queries of all heads, H D."""
        return self.heads * self.head_dim

    @classmethod
    def of(cls, model: nn.Module) -> "Size":
        """Sizes of a timm `VisionTransformer`; on the meta device it takes no memory.

        Raises:
            ValueError: It has a part whose work is not counted here.
        """
        if not isinstance(model, VisionTransformer) or isinstance(model, VisionTransformerDistilled):
            raise ValueError(f"model must be a plain timm VisionTransformer, got {type(model).__name__}")
        block = model.blocks[0]
        attn, mlp, patches = block.attn, block.mlp, model.patch_embed
        if type(mlp) is not Mlp:
            raise ValueError(f"the MLP must be timm's Mlp, got {type(mlp).__name__}")
        if getattr(attn, "gate", None) is not None or model.attn_pool is not None:
            raise ValueError("gated attention and attention pooling are not counted")
        return cls(
            depth=len(model.blocks),
            width=model.embed_dim,
            heads=attn.num_heads,
            head_dim=attn.head_dim,
            length=patches.num_patches + model.num_prefix_tokens,
            mlp_hidden=mlp.fc1.out_features,
            patch_inputs=patches.proj.weight[0].numel(),
            num_patches=patches.num_patches,
            num_classes=model.num_classes,
            class_rows=num_class_rows(model),
            parameters=_count(model),
            block_parameters=_count(block),
            layer_scale=not isinstance(block.ls1, nn.Identity),
        )


class Part(Enum):
    """A part of a step. Those of the target count forward and backward, those of the source run forward."""

    ENDS = "the target's patch embedding and head"
    SELF = "a block of the target that reads itself"
    CROSS = "a block of the target that reads the source"
    SELF_ROWS = "the same as SELF, only class rows asking and going on"
    CROSS_ROWS = "the same as CROSS, only class rows left"
    SOURCE_STEM = "the source's patch embedding"
    SOURCE = "a whole block of the source"
    SOURCE_KV = "keys and values of a block of the source alone"


class Work(NamedTuple):
    """FLOPs of one image.

    Args:
        gemm: Of linear layers and the patch embedding.
        attention: Of scores and weighted sums; where only class rows ask, with all that replaces K and V.
    """

    gemm: int
    attention: int


@dataclass(frozen=True)
class Savings:
    """What is left out of a step: everything by default; an ablation switches some off.

    Args:
        class_rows: Rows that nothing reads, in models whose head reads class tokens.
        full_source: The whole source runs in every step.
        own_kv: Blocks that read the source project keys and values of their own nevertheless.
        row_kv: Keys and values are projected where only class rows ask, too.
    """

    class_rows: bool = True
    full_source: bool = False
    own_kv: bool = False
    row_kv: bool = False


ALL_SAVINGS = Savings()
BY_HAND = Savings(class_rows=False, full_source=True, own_kv=True)


def parts(size: Size, coins: Sequence[bool], savings: Savings = ALL_SAVINGS) -> Counter[Part]:
    """How many times a step under a draw does each part."""
    plan = StepPlan(tuple(coins))
    first_row = size.depth
    if savings.class_rows and size.class_rows is not None:
        first_row = plan.first_class_row_block
    source_blocks = plan.source_blocks
    done = Counter({Part.ENDS: 1})
    for i, coin in enumerate(coins):
        if i < first_row:
            done[Part.CROSS if coin else Part.SELF] += 1
        else:
            done[Part.CROSS_ROWS if coin else Part.SELF_ROWS] += 1
        if savings.full_source or i + 1 < source_blocks:
            done[Part.SOURCE] += 1
        elif i + 1 == source_blocks and (i < first_row or savings.row_kv):
            done[Part.SOURCE_KV] += 1
    if savings.full_source or source_blocks:
        done[Part.SOURCE_STEM] += 1
    return done


def plain_parts(size: Size) -> Counter[Part]:
    """The parts of a step of plain fine-tuning."""
    return Counter({Part.ENDS: 1, Part.SELF: size.depth})


@cache
def work(size: Size, part: Part, savings: Savings = ALL_SAVINGS) -> Work:
    """FLOPs of a part, done once for one image."""
    tokens, rows, width, inner = size.length, size.class_rows or 0, size.width, size.attention_width
    of_token = inner * width + 2 * width * size.mlp_hidden  # output projection and MLP
    kv, all_kv = 2 * width * inner, 2 * tokens * 2 * width * inner
    q = width * inner + (kv if savings.own_kv else 0)
    stem = 2 * size.num_patches * size.patch_inputs * width
    products = 4 * tokens * inner  # of one row of queries with all keys, then with all values
    over_tokens = 4 * size.heads * tokens * width + 4 * inner * width  # of one row, K and V never computed
    row = products if savings.row_kv else over_tokens
    return {
        # Images need no gradient: the backward of the patch embedding is that of its weight alone.
        Part.ENDS: lambda: Work(2 * stem + 6 * width * size.num_classes, 0),
        Part.SELF: lambda: Work(6 * tokens * (width * inner + kv + of_token), 3 * tokens * products),
        # Of attention the backward has the two products of dQ; the source is constant.
        Part.CROSS: lambda: Work(6 * tokens * (q + of_token), 2 * tokens * products),
        Part.SELF_ROWS: lambda: Work(
            6 * rows * (width * inner + of_token) + (3 * all_kv if savings.row_kv else 0), 3 * rows * row
        ),
        Part.CROSS_ROWS: lambda: Work(6 * rows * (q + of_token), 2 * rows * row),
        Part.SOURCE_STEM: lambda: Work(stem, 0),
        Part.SOURCE: lambda: Work(2 * tokens * (width * inner + kv + of_token), tokens * products),
        Part.SOURCE_KV: lambda: Work(all_kv, 0),
    }[part]()


def total(size: Size, done: Counter[Part], savings: Savings = ALL_SAVINGS) -> Work:
    """FLOPs of all parts of a step, of one image."""
    works = [(times, work(size, part, savings)) for part, times in done.items()]
    return Work(sum(n * w.gemm for n, w in works), sum(n * w.attention for n, w in works))


def step_flops(
    size: Size,
    coins: Sequence[bool],
    class_rows: bool = True,
    full_source: bool = False,
    own_kv: bool = False,
    row_kv: bool = False,
) -> int:
    """FLOPs of forward and backward of our step for one image; the switches are those of `Savings`."""
    savings = Savings(class_rows, full_source, own_kv, row_kv)
    return sum(total(size, parts(size, coins, savings), savings))


def plain_flops(size: Size) -> int:
    """FLOPs of forward and backward of plain fine-tuning for one image."""
    return sum(total(size, plain_parts(size)))


def draw_classes(depth: int) -> list[tuple[Draw, int]]:
    """One draw for each cost that a step can have, and how many draws share it.

    The cost depends on how many blocks at the end agree, and on how many of those before them read the
    source, not on which: of 2^L draws about L^2 differ.
    """
    classes: list[tuple[Draw, int]] = [((False,) * depth, 1), ((True,) * depth, 1)]
    for end in (False, True):
        for free in range(depth - 1):  # blocks before the last one that differs from those at the end
            tail = (not end, *(end,) * (depth - 1 - free))
            classes += [
                ((*(True,) * n, *(False,) * (free - n), *tail), comb(free, n)) for n in range(free + 1)
            ]
    return classes


def draw_class(coins: Draw) -> tuple[bool, int, int]:
    """Equal for draws of one class: the last coin, how many at the end agree, how many read the source."""
    end = coins[-1]
    agree = coins[::-1].index(not end) if (not end) in coins else len(coins)
    return end, agree, sum(coins)


def distribution(depth: int, p: float) -> list[tuple[Draw, float]]:
    """The classes of draws, and the probability of each; exact for any depth.

    Args:
        depth: L.
        p: Probability that a block reads the source, independently of the others.

    Raises:
        ValueError: p is no probability.
    """
    if not 0 <= p <= 1:
        raise ValueError(f"p must be between 0 and 1, got {p}")
    return [
        (coins, count * p ** sum(coins) * (1 - p) ** (depth - sum(coins)))
        for coins, count in draw_classes(depth)
    ]


def expectation(cost: Callable[[Draw], float], depth: int, p: float) -> float:
    """Exact expectation over the coins of a cost that is equal for draws of one class."""
    return sum(chance * cost(coins) for coins, chance in distribution(depth, p) if chance)


@cache
def expected_parts(size: Size, p: float, savings: Savings = ALL_SAVINGS) -> dict[Part, float]:
    """Exact expectation over the coins of how many times a step does each part."""
    expected = dict.fromkeys(Part, 0.0)
    for coins, chance in distribution(size.depth, p):
        for part, times in parts(size, coins, savings).items():
            expected[part] += chance * times
    return expected


def expected_flops(
    size: Size,
    p: float,
    class_rows: bool = True,
    full_source: bool = False,
    own_kv: bool = False,
    row_kv: bool = False,
) -> float:
    """Exact expectation of `step_flops` over the coins."""
    return expectation(
        lambda coins: step_flops(size, coins, class_rows, full_source, own_kv, row_kv), size.depth, p
    )


def expected_source_blocks(depth: int, p: float) -> float:
    """Expected number of blocks of the source that are needed, of the last one K and V alone."""
    return depth - sum((1 - p) ** j for j in range(1, depth + 1))


def representative_draws(size: Size, p: float, count: int, seed: int = 0) -> list[Draw]:
    """A few draws that stand for all: their mean FLOPs and mean share of the source are close to expected.

    Of random sets of independent draws the one is taken whose two means together deviate least.

    Args:
        size: Of the model.
        p: Probability that a block reads the source.
        count: How many draws; one where all draws are the same.
        seed: Of the random sets; the same arguments return the same draws.
    """
    if p in (0.0, 1.0):
        return [(p == 1.0,) * size.depth]
    flops = expected_flops(size, p)
    source = expected_source_blocks(size.depth, p) / size.depth
    generator = np.random.default_rng(seed)
    known: dict[tuple[bool, int, int], tuple[float, float]] = {}

    def costs(coins: Draw) -> tuple[float, float]:
        kind = draw_class(coins)
        if kind not in known:
            known[kind] = step_flops(size, coins) / flops, StepPlan(coins).source_fraction
        return known[kind]

    def deviation(draws: list[Draw]) -> float:
        mean_flops, mean_source = np.mean([costs(coins) for coins in draws], axis=0)
        return abs(mean_flops - 1) + abs(mean_source - source)

    candidates = generator.random((CANDIDATES, count, size.depth)) < p
    return min(([tuple(draw) for draw in draws] for draws in candidates.tolist()), key=deviation)


def _count(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())
