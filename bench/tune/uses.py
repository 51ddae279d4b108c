"""How each kernel is called: what is timed, and what only has to compile."""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from bench.kernels import inputs
from bench.kernels.inputs import Draw
from bench.kernels.providers import Results
from bench.kernels.shapes import Shape
from bench.programs import MODULES
from bench.tune.candidates import Candidate
from stochca_kernels import backward, forward, ops, tiles, tokens
from stochca_kernels.tiles import Kernel, Tiles

Tensors = dict[str, Tensor]


@dataclass(frozen=True)
class Use:
    """One way to call a kernel.

    Args:
        name: As it is printed.
        draw: Makes its inputs.
        run: Calls the launcher.
        prepare: What a backward needs of its forward, added to the inputs.
        timed: Whether it is timed; others have to compile.
    """

    name: str
    draw: Callable[[Draw], Tensors]
    run: Callable[[Tensors, float], Any]
    prepare: Callable[[Tensors, float], Any] | None = None
    timed: bool = True

    def bind(self, tensors: Tensors, shape: Shape) -> Callable[[], Results]:
        """Run what comes before, and return the call."""
        scale = shape.head_dim**-0.5
        if self.prepare is not None:
            tensors = {**tensors, **dict(zip(("out", "lse"), self.prepare(tensors, scale), strict=False))}
        return lambda: {str(i): t for i, t in enumerate(self.run(tensors, scale)) if t.numel() > 0}


class MetaDraw(Draw):
    """As `Draw`, without memory: for what is compiled and not run."""

    def __init__(self, shape: Shape, dtype: torch.dtype) -> None:
        self.shape, self.dtype, self.device = shape, dtype, torch.device("meta")

    def normal(self, *size: int, std: float = 1.0) -> Tensor:
        """No numbers at all."""
        return torch.empty(size, dtype=self.dtype, device=self.device)


@contextmanager
def forced(kernel: Kernel, candidate: Candidate) -> Iterator[None]:
    """Make the launchers choose these tiles for one kernel: or none, and so another kernel."""
    choose = tiles.choose_tiles

    def chosen(name: Kernel, q: Tensor, *lengths: int) -> tuple[Tiles, ...]:
        if name != kernel:
            return choose(name, q, *lengths)
        return () if candidate is None else (candidate,)

    with ExitStack() as stack:
        for module in MODULES:
            stack.enter_context(mock.patch.object(module, "choose_tiles", chosen))
        yield


def _class_rows(draw: Draw) -> Tensors:
    """Queries of one class row in the space of the tokens, with scores of unit scale."""
    shape = draw.shape
    size, std = (shape.batch, shape.heads, shape.width), (shape.head_dim / shape.width) ** 0.5
    coins = torch.arange(shape.batch, device=draw.device) % 2 == 1
    tokens_of = (shape.batch, shape.length, shape.width)
    return {
        "queries": draw.normal(*size, std=std),
        "grad": draw.normal(*size),
        "x": draw.normal(*tokens_of),
        "source_x": draw.normal(*tokens_of),
        "rstd": torch.ones(tokens_of[:2], device=draw.device),
        "coins": coins,
    }


def _projection(draw: Draw) -> Tensors:
    """Queries of both models, the tokens, and all that may come with them."""
    width, shape = draw.shape.width, draw.shape
    return {
        **inputs.projection_with_source(draw),
        **dict(zip(("k", "v"), inputs.split(draw.packed())[1:], strict=True)),
        "q_weight": draw.normal(width, width, std=width**-0.5),
        "q_bias": draw.normal(width, std=0.1),
        "rstd": torch.ones((shape.batch, shape.length), device=draw.device),
        "coins": torch.arange(shape.batch, device=draw.device) % 2 == 1,
    }


def _everything(draw: Draw) -> Tensors:
    return {**inputs.own_and_source(draw), **inputs.coins(draw)}


def _own(t: Tensors, scale: float) -> Any:
    return forward.attention_forward(t["q"], t["k"], t["v"], None, None, None, None, scale, True)


def _with_source(t: Tensors, scale: float) -> Any:
    return forward.attention_forward(t["q"], t["k"], t["v"], None, None, None, t["source_q"], scale, True)


def _mixed(t: Tensors, scale: float) -> Any:
    pairs = (t["k"], t["v"], t["source_k"], t["source_v"])
    return forward.attention_forward(t["q"], *pairs, t["coins"], t["source_q"], scale, True)


def _backward(t: Tensors, scale: float, coins: bool, needs_dkdv: bool) -> Any:
    source_k, source_v, use_source = (
        t[name] if coins else None for name in ("source_k", "source_v", "coins")
    )
    return backward.attention_backward(
        t["grad"],
        t["q"],
        t["k"],
        t["v"],
        source_k,
        source_v,
        use_source,
        t["out"],
        t["lse"],
        scale,
        needs_dkdv,
    )


def _split(t: Tensors, scale: float, coins: bool) -> Any:
    with mock.patch.object(backward, "has_joint_backward", return_value=False):
        return _backward(t, scale, coins, True)


def _project(t: Tensors, scale: float) -> Any:
    source = (t["x"], t["weight"], t["bias"], None, None)
    return ops.projected_attention_forward(
        t["q"], None, None, *source, t["source_q"], None, None, scale, True
    )


def _project_mixed(t: Tensors, scale: float) -> Any:
    own, source = (t["q"], t["k"], t["v"]), (t["x"], t["weight"], t["bias"], t["rstd"], t["coins"])
    asking = (None, t["q_weight"], t["q_bias"])
    return ops.projected_attention_forward(*own, *source, *asking, scale, True)


def _projected_dq(t: Tensors, scale: float) -> Any:
    source = (t["x"], t["weight"], t["bias"], None, None)
    return ops.projected_attention_backward(
        t["grad"], t["q"], None, None, *source, t["out"], t["lse"], scale, False
    )


def _projected_dq_mixed(t: Tensors, scale: float) -> Any:
    own, source = (t["q"], t["k"], t["v"]), (t["x"], t["weight"], t["bias"], t["rstd"], t["coins"])
    return ops.projected_attention_backward(t["grad"], *own, *source, t["out"], t["lse"], scale, False)


def _tokens(t: Tensors, scale: float) -> Any:
    return tokens.tokens_forward(t["queries"], t["x"], None, None, None, None, scale)


def _tokens_mixed(t: Tensors, scale: float) -> Any:
    return tokens.tokens_forward(t["queries"], t["x"], None, t["source_x"], t["rstd"], t["coins"], scale)


def _tokens_backward(t: Tensors, scale: float, coins: bool, needs_dx: bool) -> Any:
    source_x, rstd, use_source = (t[name] if coins else None for name in ("source_x", "rstd", "coins"))
    return tokens.tokens_backward(
        t["grad"], t["queries"], t["x"], None, source_x, rstd, use_source, t["out"], t["lse"], scale, needs_dx
    )


USES: dict[Kernel, tuple[Use, ...]] = {
    "fwd": (
        Use("self", inputs.own, _own),
        Use("cross with source", inputs.own_and_source, _with_source),
        Use("mixed", _everything, _mixed, timed=False),
    ),
    "dq": (
        Use("cross", inputs.own, lambda t, s: _backward(t, s, False, False), _own),
        Use("mixed", _everything, lambda t, s: _split(t, s, True), _own, timed=False),
    ),
    # Together with the kernel before it, which leaves what it needs.
    "dkdv": (
        Use("self", inputs.own, lambda t, s: _split(t, s, False), _own),
        Use("mixed", _everything, lambda t, s: _split(t, s, True), _own, timed=False),
    ),
    "dqkv": (
        Use("self", inputs.own, lambda t, s: _backward(t, s, False, True), _own),
        Use("mixed", _everything, lambda t, s: _backward(t, s, True, True), _own, timed=False),
    ),
    "projected_fwd": (
        Use("cross with source", _projection, _project),
        Use("mixed", _projection, _project_mixed, timed=False),
    ),
    "projected_dq": (
        Use("cross", _projection, _projected_dq, _project),
        Use("mixed", _projection, _projected_dq_mixed, _project, timed=False),
    ),
    "tokens_fwd": (
        Use("self", _class_rows, _tokens),
        Use("mixed", _class_rows, _tokens_mixed, timed=False),
    ),
    "tokens_bwd": (
        Use("self", _class_rows, lambda t, s: _tokens_backward(t, s, False, True), _tokens),
        Use("cross", _class_rows, lambda t, s: _tokens_backward(t, s, False, False), _tokens),
        Use("mixed", _class_rows, lambda t, s: _tokens_backward(t, s, True, True), _tokens, timed=False),
    ),
}
