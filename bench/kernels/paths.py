"""What the operator is asked to do in training, and how it would be done with another attention function."""

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Literal
from unittest import mock

import torch
from torch import Tensor
from torch.nn import functional as F

from bench.kernels import inputs
from bench.kernels.attend import Attend
from bench.kernels.inputs import Draw, split
from bench.kernels.shapes import SHAPES, VIT_B_224, VIT_B_448, Shape
from stochca_kernels import Projection, stochca_attention
from stochca_kernels.attention import Impl

Pass = Literal["forward", "backward", "forward+backward"]
Tensors = Mapping[str, Tensor]
Outputs = tuple[Tensor, ...]
"""The target's output, then the source's own where there is one."""
Run = Callable[[Tensors], Outputs]


@dataclass(frozen=True)
class Path:
    """One way through the operator.

    Args:
        name: As in the results.
        passes: What of it is measured.
        draw: Makes its inputs by name; "grad" is the gradient of the output.
        leaves: Names of those whose gradients are asked for.
        ours: How the operator does it.
        rival: How it is done with another attention function.
        flops: Operations of the forward, and of the backward.
        shapes: Where it is measured.
        impl: The implementation that is measured as ours.
        unread: Inputs whose bytes are not counted: as many of others need not be read.
        others: Rivals besides those with another attention function.
        flex: Whether FlexAttention, which is compiled for each shape, is a rival too.
    """

    name: str
    passes: tuple[Pass, ...]
    draw: Callable[[Draw], dict[str, Tensor]]
    leaves: tuple[str, ...]
    ours: Callable[[Tensors, Impl], Outputs]
    rival: Callable[[Tensors, Attend], Outputs]
    flops: Callable[[Shape], tuple[float, float]]
    shapes: tuple[Shape, ...] = SHAPES
    impl: Impl = "triton"
    unread: tuple[str, ...] = ()
    others: Mapping[str, Run] = field(default_factory=dict)
    flex: bool = False

    def ours_with(self, impl: Impl) -> Run:
        """The operator, one of its implementations."""
        return lambda tensors: self.ours(tensors, impl)

    def rival_with(self, attend: Attend) -> Run:
        """The same with one attention function."""
        return lambda tensors: self.rival(tensors, attend)


# Operations of a backward over those of its forward: five products for all gradients, or three for dQ alone,
# where the forward has two.
FULL, ONLY_DQ = 2.5, 1.5


def attention_flops(shape: Shape) -> int:
    """Operations of one attention over all rows: two products of `2 B H N N D`."""
    return 4 * shape.batch * shape.heads * shape.length**2 * shape.head_dim


def projection_flops(shape: Shape) -> int:
    """Operations of computing K and V of all tokens."""
    return 4 * shape.batch * shape.length * shape.width**2


def class_row_flops(shape: Shape) -> int:
    """Operations of one query per head that attends to tokens without computing a key or a value."""
    return 4 * shape.batch * shape.heads * shape.width * (shape.head_dim + shape.length)


def _pair(t: Tensors) -> tuple[Tensor, Tensor]:
    return t["k"], t["v"]


def _source_pair(t: Tensors) -> tuple[Tensor, Tensor]:
    return t["source_k"], t["source_v"]


def _projection(t: Tensors) -> Projection:
    return Projection(t["x"], t["weight"], t["bias"])


def _projected(t: Tensors) -> tuple[Tensor, Tensor]:
    packed = F.linear(t["x"], t["weight"], t["bias"]).unflatten(-1, (2, t["q"].shape[1], -1))
    k, v = packed.permute(2, 0, 3, 1, 4).unbind(0)
    return k, v


def _chosen_pair(t: Tensors) -> tuple[Tensor, Tensor]:
    coin = t["coins"][:, None, None, None]
    return torch.where(coin, t["source_k"], t["k"]), torch.where(coin, t["source_v"], t["v"])


def _ours_projection(t: Tensors, impl: Impl) -> Outputs:
    with mock.patch.dict(os.environ, STOCHCA_FUSED_PROJECTION="1"):
        return stochca_attention(t["q"], None, _projection(t), True, source_q=t["source_q"], impl=impl)


def _product_and_ours(t: Tensors) -> Outputs:
    source_q = t["source_q"]
    return stochca_attention(t["q"], None, _projected(t), True, source_q=source_q, impl="triton")


def _rival_projection(t: Tensors, attend: Attend) -> Outputs:
    k, v = _projected(t)
    return attend(t["q"], k, v), attend(t["source_q"], k, v)


SELF = Path(
    name="self",
    passes=("forward", "backward", "forward+backward"),
    draw=inputs.own,
    leaves=("q", "k", "v"),
    ours=lambda t, impl: (stochca_attention(t["q"], _pair(t), None, False, impl=impl),),
    rival=lambda t, attend: (attend(t["q"], *_pair(t)),),
    flops=lambda shape: (attention_flops(shape), FULL * attention_flops(shape)),
    flex=True,
)
SELF_PACKED = Path(
    name="self-packed",
    passes=("backward", "forward+backward"),
    draw=inputs.own_packed,
    leaves=("qkv",),
    ours=lambda t, impl: (stochca_attention(t["qkv"], None, None, False, impl=impl),),
    rival=lambda t, attend: (attend(*split(t["qkv"])),),
    flops=SELF.flops,
)
SELF_WITH_SOURCE = Path(
    name="self-with-source",
    passes=("forward",),
    draw=inputs.own_and_source,
    leaves=(),
    ours=lambda t, impl: stochca_attention(
        t["q"], _pair(t), _source_pair(t), False, source_q=t["source_q"], impl=impl
    ),
    rival=lambda t, attend: (attend(t["q"], *_pair(t)), attend(t["source_q"], *_source_pair(t))),
    flops=lambda shape: (2 * attention_flops(shape), 0),
)
CROSS = Path(
    name="cross",
    passes=("backward", "forward+backward"),
    draw=inputs.cross,
    leaves=("q",),
    ours=lambda t, impl: (stochca_attention(t["q"], None, _source_pair(t), True, impl=impl),),
    rival=lambda t, attend: (attend(t["q"], *_source_pair(t)),),
    flops=lambda shape: (attention_flops(shape), ONLY_DQ * attention_flops(shape)),
)
CROSS_WITH_SOURCE = Path(
    name="cross-with-source",
    passes=("forward",),
    draw=inputs.cross_with_source,
    leaves=(),
    ours=lambda t, impl: stochca_attention(
        t["q"], None, _source_pair(t), True, source_q=t["source_q"], impl=impl
    ),
    rival=lambda t, attend: (attend(t["q"], *_source_pair(t)), attend(t["source_q"], *_source_pair(t))),
    flops=SELF_WITH_SOURCE.flops,
)
# "auto" computes no key and no value where few query rows meet a `Projection`.
CLASS_ROW_SELF = Path(
    name="class-row-self",
    passes=("forward+backward",),
    draw=inputs.class_row,
    leaves=("q", "x", "weight", "bias"),
    ours=lambda t, impl: (stochca_attention(t["q"], _projection(t), None, False, impl=impl),),
    rival=lambda t, attend: (attend(t["q"], *_projected(t)),),
    flops=lambda shape: (class_row_flops(shape), FULL * class_row_flops(shape)),
    shapes=(VIT_B_224, VIT_B_448),
    impl="auto",
)
CLASS_ROW_CROSS = Path(
    name="class-row-cross",
    passes=("forward+backward",),
    draw=inputs.class_row,
    leaves=("q",),
    ours=lambda t, impl: (stochca_attention(t["q"], None, _projection(t), True, impl=impl),),
    rival=CLASS_ROW_SELF.rival,
    flops=lambda shape: (class_row_flops(shape), ONLY_DQ * class_row_flops(shape)),
    shapes=(VIT_B_224, VIT_B_448),
    impl="auto",
)
PROJECTION_WITH_SOURCE = Path(
    name="projection-with-source",
    passes=("forward", "forward+backward"),
    draw=inputs.projection_with_source,
    leaves=("q",),
    ours=_ours_projection,
    rival=_rival_projection,
    flops=lambda shape: (
        projection_flops(shape) + 2 * attention_flops(shape),
        ONLY_DQ * attention_flops(shape),
    ),
    others={"product + ours": _product_and_ours},
)
COINS = Path(
    name="coins",
    passes=("forward", "backward"),
    draw=inputs.coins,
    leaves=("q", "k", "v"),
    ours=lambda t, impl: (stochca_attention(t["q"], _pair(t), _source_pair(t), t["coins"], impl=impl),),
    rival=lambda t, attend: (attend(t["q"], *_chosen_pair(t)),),
    flops=SELF.flops,
    unread=("source_k", "source_v"),
)
PATHS = (
    SELF,
    SELF_PACKED,
    SELF_WITH_SOURCE,
    CROSS,
    CROSS_WITH_SOURCE,
    CLASS_ROW_SELF,
    CLASS_ROW_CROSS,
    PROJECTION_WITH_SOURCE,
    COINS,
)
