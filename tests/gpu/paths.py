"""Every path through the kernels as one call on tensors by name, which all files of this folder run."""

import contextlib
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple, TypeAlias

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")

from stochca_kernels import Projection, backward, stochca_attention
from stochca_kernels.projection import KV, unpack
from stochca_kernels.testing import assert_close_to_exact

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "tf32": torch.float32, "ieee": torch.float32}
OUTPUTS = ("out", "source_out")

gpu = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU"),
]

Tensors: TypeAlias = dict[str, Tensor]


class Case(NamedTuple):
    """One call of the operator.

    The defaults are those of ViT-Tiny. Tests share them where they can: every new kind costs a compilation.

    Args:
        path: "pair" is given keys and values; "split" the same with two kernels for the backward at any
            length; "packed" takes its own projection packed; "fused" computes the source's keys, values and
            queries inside the kernel, its own being packed; "tokens" has few rows of queries.
        coin: What the samples read: "self", "cross", or "mixed" for every other one.
        length: Number of tokens of both sides.
        head_dim: D.
        arithmetic: "bf16" or "fp16"; "tf32" or "ieee" for products of float32.
        batch: B.
        heads: H.
        channels: C of the tokens, where there are any.
        rows: Rows of queries of the path "tokens".
    """

    path: str
    coin: str = "mixed"
    length: int = 197
    head_dim: int = 64
    arithmetic: str = "bf16"
    batch: int = 4
    heads: int = 3
    channels: int = 192
    rows: int = 1

    def __str__(self) -> str:
        rows = f"-Nq{self.rows}" if self.path == "tokens" else ""
        shape = f"B{self.batch}-H{self.heads}{rows}-N{self.length}-D{self.head_dim}"
        return f"{self.path}-{self.coin}-{shape}-{self.arithmetic}"

    @property
    def leaves(self) -> tuple[str, ...]:
        """Names of what receives a gradient."""
        if self.path == "tokens":
            return "q", "x", "weight", "bias"
        return ("qkv",) if self.path in ("packed", "fused") else ("q", "k", "v")


PATHS = tuple(Case(path) for path in ("pair", "split", "packed", "fused", "tokens"))
paths = pytest.mark.parametrize("case", PATHS, ids=str)


def draw(case: Case, device: str = DEVICE) -> Tensors:
    """Draw the tensors of a call by name, `grad` of its output included."""
    generator = torch.Generator().manual_seed(0)
    _, _, length, head_dim, _, batch, heads, channels, _ = case
    dtype = DTYPES[case.arithmetic]

    def normal(*shape: int, scale: float = 1.0, dtype: torch.dtype = dtype) -> Tensor:
        return (torch.randn(shape, generator=generator) * scale).to(device, dtype)

    def projection(prefix: str, parts: int) -> Tensors:
        rows = parts * heads * head_dim
        return {
            f"{prefix}weight": normal(rows, channels, scale=channels**-0.5),
            f"{prefix}bias": normal(rows),
        }

    def source_tokens() -> Tensors:
        rstd = normal(batch, length, dtype=torch.float32).sigmoid() + 0.25
        return {"source_x": normal(batch, length, channels), "source_rstd": rstd, **projection("source_", 2)}

    def pair(prefix: str) -> Tensors:
        packed = normal(batch, length, 3, heads, head_dim)
        return {f"{prefix}{name}": t for name, t in zip("qkv", unpack(packed), strict=True)}

    tensors: Tensors
    if case.path == "tokens":
        tensors = {"q": normal(batch, heads, case.rows, head_dim), "x": normal(batch, length, channels)}
        tensors |= projection("", 2) | source_tokens()
    elif case.path == "fused":
        tensors = {"qkv": normal(batch, length, 3, heads, head_dim), **source_tokens()}
        tensors |= projection("source_q_", 1)
    else:
        packed = {"qkv": normal(batch, length, 3, heads, head_dim)} if case.path == "packed" else pair("")
        tensors = packed | pair("source_")
    rows = case.rows if case.path == "tokens" else length
    return {
        **tensors,
        "coins": torch.arange(batch, device=device) % 2 == 1,
        "grad": normal(batch, rows, heads, head_dim).transpose(1, 2),
    }


def call(case: Case, t: Tensors, impl: Any = "triton") -> Tensors:
    """Call the operator; return its outputs by name."""
    coin: bool | Tensor = t["coins"] if case.coin == "mixed" else case.coin == "cross"
    source: KV
    source_q: Tensor | Projection
    if case.path in ("fused", "tokens"):
        source = Projection(t["source_x"], t["source_weight"], t["source_bias"], t["source_rstd"])
    else:
        source = (t["source_k"], t["source_v"])
    if case.path == "tokens":
        own = Projection(t["x"], t["weight"], t["bias"])
        return {"out": stochca_attention(t["q"], own, source, coin, impl=impl)}
    if case.path == "fused":
        source_q = Projection(t["source_x"], t["source_q_weight"], t["source_q_bias"], t["source_rstd"])
    else:
        source_q = t["source_q"]
    q, kv = (t["q"], (t["k"], t["v"])) if "q" in t else (t["qkv"], None)
    out, source_out = stochca_attention(q, kv, source, coin, source_q=source_q, impl=impl)
    return {"out": out, "source_out": source_out}


@contextlib.contextmanager
def settings(case: Case) -> Iterator[None]:
    """Set what a case asks of the dispatch and of torch."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("STOCHCA_FUSED_PROJECTION", "1")
        if case.path == "split":
            patch.setattr(backward, "has_joint_backward", lambda q, len_kv: False)
        if DTYPES[case.arithmetic] != torch.float32:
            yield
            return
        products = torch.backends.cuda.matmul
        precision = products.fp32_precision
        products.fp32_precision = case.arithmetic
        try:
            yield
        finally:
            products.fp32_precision = precision


@contextlib.contextmanager
def poisoned() -> Iterator[None]:
    """Everything that the launchers allocate is NaN until a kernel writes it."""

    def poison(allocate: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def poisoned(*args: Any, **kwargs: Any) -> Tensor:
            memory = allocate(*args, **kwargs)
            return memory.fill_(float("nan")) if memory.is_floating_point() else memory

        return poisoned

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.Tensor, "new_empty", poison(torch.Tensor.new_empty))
        patch.setattr(torch.Tensor, "new_empty_strided", poison(torch.Tensor.new_empty_strided))
        patch.setattr(torch, "empty_like", poison(torch.empty_like))
        yield


def with_leaves(case: Case, tensors: Tensors) -> Tensors:
    """The same tensors, new leaves where a gradient is wanted."""
    return tensors | {name: tensors[name].detach().requires_grad_() for name in case.leaves}


def run(
    case: Case, tensors: Tensors, impl: str = "triton", function: Callable[..., Tensors] = call
) -> Tensors:
    """Outputs, and gradients named `d...`, by name."""
    with settings(case):
        tensors = with_leaves(case, tensors)
        outputs = function(case, tensors, impl)
        out = outputs["out"]
        grads = torch.autograd.grad(
            out, [tensors[name] for name in case.leaves], tensors["grad"].to(out.dtype)
        )
    results = {name: t.detach() for name, t in outputs.items()}
    return results | {f"d{name}": grad for name, grad in zip(case.leaves, grads, strict=True)}


def cast(tensors: Tensors, dtype: torch.dtype) -> Tensors:
    """All tensors in another dtype, but for the coins and for factors, which are always float32."""
    keep = ("coins", "source_rstd")
    return {name: t if name in keep else t.to(dtype) for name, t in tensors.items()}


def assert_accurate(case: Case, actual: Tensors, tensors: Tensors) -> None:
    """Assert that errors are at most twice those of eager torch, for gradients three times by the maximum."""
    eager = run(case, tensors, "reference")
    exact = run(case, cast(tensors, torch.float64), "reference")
    # The matrix unit drops the bits of a float32 that TF32 does not have, where cuBLAS may round them.
    allowance = 2.0 if case.arithmetic == "tf32" else 1.0
    for name, value in actual.items():
        factor = allowance * (2.0 if name in OUTPUTS else 3.0)
        budget = (eager[name], exact[name])
        try:
            assert_close_to_exact(value, *budget, factor=factor)
            assert_close_to_exact(value, *budget, factor=2 * allowance, measure="rms")
        except AssertionError as error:
            raise AssertionError(f"{name}: {error}") from None


def capture(step: Callable[[], tuple[Tensor, ...]]) -> tuple[tuple[Tensor, ...], Callable[[], None]]:
    """Record a step as a CUDA graph, after a warm-up; return its outputs, and what replays it."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        outputs = step()
    return outputs, graph.replay
