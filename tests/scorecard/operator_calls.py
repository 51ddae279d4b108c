"""Calls of the operator, drawn at random: their shapes, layouts, coins and scales, and how one is run."""

import contextlib
import os
import warnings
from collections.abc import Iterator
from typing import Any, NamedTuple
from unittest import mock

import torch
from hypothesis import strategies as st
from torch import Tensor

from stochca_kernels import Projection, stochca_attention
from stochca_kernels.projection import KV, pair_of, project, unpack

Tensors = dict[str, Tensor]

HEAD_DIMS = tuple(range(16, 129, 8))
LAYOUTS = ("contiguous", "packed", "permuted", "expanded", "misaligned", "spaced")
# Where programs change: tiles begin, keys no longer stay on chip, one kernel becomes two.
EDGES = (1, 2, 15, 16, 17, 31, 63, 64, 65, 127, 128, 129)
LONG = (196, 197, 208, 209, 256, 257, 272, 273)
LARGEST = (785, 1370, 4096, 4097)
SCALES = (1e-8, 1e-4, 1e-2, 1.0, 1e2, 1e4)
WIDTHS = (1, 8, 24, 48, 100, 192)
# The interpreter multiplies the bits of a bfloat16 (Triton's issue 11584).
DTYPES = {"triton": (torch.float32, torch.float16), "sdpa": (torch.float32, torch.float16, torch.bfloat16)}
OUTPUTS = ("out", "source_out")
# What receives a gradient, where a call has it.
LEAVES = ("qkv", "q", "k", "v", "x", "weight", "bias")
# What `run` takes for eager torch over the tokens of projections, without keys and values; and for eager
# torch in a wider dtype, what is projected rounded to that of the call.
ASSOCIATED, WIDE = "associated", "wide"
KEPT = ("source_rstd", "coins")  # of a dtype of their own


class Call(NamedTuple):
    """One call.

    Args:
        impl: Which implementation runs it.
        dtype: Of all inputs.
        batch: B.
        heads: H.
        head_dim: D.
        lengths: Number of queries, of own keys, of keys of the source, and of its queries.
        own: The target's side: "pair", "packed", "projection", or "none".
        source: The source's side: "pair", "projection", or "none".
        source_q: The source's queries: "none", "given", or "projected" from the tokens of such a `source`.
        coins: One for all, or one for each sample.
        fuses: Whether keys and values of a source are computed inside the kernel.
        widths: C of the target's and of the source's tokens.
        has_bias: Whether projections have one.
        has_factor: Whether the source's tokens have one each.
        scale: As the operator takes it.
        sizes: Standard deviations of what makes scores, of values, and of the output's gradient.
        layouts: Of tensors in the order in which they are made, again from the first where there are more.
        seed: Of the numbers.
    """

    impl: str
    dtype: torch.dtype
    batch: int = 2
    heads: int = 2
    head_dim: int = 16
    lengths: tuple[int, int, int, int] = (5, 7, 6, 4)
    own: str = "pair"
    source: str = "pair"
    source_q: str = "none"
    coins: bool | tuple[bool, ...] = False
    fuses: bool = False
    widths: tuple[int, int] = (24, 24)
    has_bias: bool = True
    has_factor: bool = False
    scale: float | None = None
    sizes: tuple[float, float, float] = (1.0, 1.0, 1.0)
    layouts: tuple[str, ...] = ("packed",)
    seed: int = 0

    @property
    def factor(self) -> float:
        """What multiplies the scores."""
        return self.head_dim**-0.5 if self.scale is None else self.scale

    @property
    def is_associated(self) -> bool:
        """Whether few rows ask projections, so that keys and values need not be computed."""
        read = {"projection"} & {self.own, self.source}
        return bool(read) and self.batch > 0 and self.lengths[0] < self.head_dim

    @property
    def leaves(self) -> tuple[str, ...]:
        """Names of the tensors that receive gradients."""
        of_side = {"packed": ("qkv",), "pair": ("q", "k", "v"), "none": ("q",)}
        projection = ("q", "x", "weight", *(("bias",) if self.has_bias else ()))
        return of_side.get(self.own, projection)


@st.composite
def calls(draw: st.DrawFn, impl: str) -> Call:
    """Strategy for calls that the interpreter affords: most are short, few have a long side."""
    kind = draw(st.sampled_from(("few", "few", *("short",) * 7, "long", "largest")))
    is_short = kind in ("few", "short")
    short = st.one_of(st.integers(1, 40), st.sampled_from(EDGES))
    few = st.integers(0, 3)
    one, other = {
        "few": (few, short),
        "short": (st.one_of(st.just(0), short), short),
        "long": (st.sampled_from(LONG), st.integers(1, 40)),
        "largest": (st.sampled_from(LARGEST), st.integers(1, 20)),
    }[kind]
    if not is_short and draw(st.booleans()):
        one, other = other, one
    queries, keys, source_keys, source_queries = (draw(length) for length in (one, other, other, one))
    if draw(st.booleans()):  # as two models of one size have it
        source_keys, source_queries = keys, queries
    batch = draw(st.sampled_from((0, 1, 2, 3, 5) if is_short else (1, 2)))
    coins = draw(st.one_of(st.booleans(), st.tuples(*[st.booleans()] * batch)))
    sides = ("pair",) if kind == "largest" and impl == "triton" else ("projection", "pair")
    own = draw(st.sampled_from((*sides, "packed") if kind in ("short", "long") else sides))
    if coins is True and draw(st.booleans()):
        own = "none"
    source = draw(st.sampled_from(sides))
    source_q = draw(st.sampled_from(("none", "given", "projected"))) if is_short and kind != "few" else "none"
    if coins is False and source_q == "none" and draw(st.booleans()):
        source = "none"
    size = st.sampled_from(SCALES) if draw(st.booleans()) else st.just(1.0)
    return Call(
        impl=impl,
        dtype=draw(st.sampled_from(DTYPES[impl])),
        batch=batch,
        heads=draw(st.integers(1, 3)) if is_short else 1,
        head_dim=draw(st.sampled_from(HEAD_DIMS if impl == "sdpa" or is_short else HEAD_DIMS[:3])),
        lengths=(keys if own == "packed" else queries, keys, source_keys, source_queries),
        own=own,
        source=source,
        source_q=source_q,
        coins=coins,
        fuses=draw(st.booleans()),
        widths=draw(st.tuples(st.sampled_from(WIDTHS), st.sampled_from(WIDTHS))),
        has_bias=draw(st.booleans()),
        has_factor=draw(st.booleans()),
        scale=draw(st.one_of(st.none(), st.sampled_from((0.0, 1e-3, 0.5, -0.25)))),
        sizes=(draw(size), draw(size), draw(size)),
        layouts=tuple(draw(st.lists(st.sampled_from(LAYOUTS), min_size=1, max_size=8))),
        seed=draw(st.integers(0, 2**16)),
    )


def lay(x: Tensor, layout: str) -> Tensor:
    """The values of `x [..., N, D]` laid out otherwise; "expanded" repeats those of its first index."""
    if layout == "contiguous" or x.numel() == 0 or (layout in ("packed", "permuted") and x.ndim < 3):
        return x.contiguous()
    if layout == "expanded":
        return x[:1].contiguous().expand_as(x)
    if layout == "misaligned":
        memory = x.new_empty(x.numel() + 1)[1:]
        return memory.view(x.shape).copy_(x)
    if layout == "spaced":  # every other row, of longer rows
        rows = x.new_full((*x.shape[:-2], 2 * x.shape[-2], x.shape[-1] + 3), torch.nan)
        rows = rows[..., ::2, : x.shape[-1]]
        return rows.copy_(x)
    if layout == "permuted":
        order = (*reversed(range(x.ndim - 1)), x.ndim - 1)
        return x.permute(order).contiguous().permute([order.index(i) for i in range(x.ndim)])
    # As one part of a packed projection, token-major.
    rows = x.movedim(-2, 1)
    packed = torch.stack((torch.full_like(rows, torch.nan), rows, torch.full_like(rows, torch.nan)), 2)
    return packed[:, :, 1].movedim(1, -2)


def tensors_of(call: Call) -> Tensors:
    """Draw the tensors of a call by name."""
    generator = torch.Generator().manual_seed(call.seed)
    queries, keys, source_keys, source_queries = call.lengths
    score, value, gradient = call.sizes
    batch, heads, dim = call.batch, call.heads, call.head_dim
    made: Tensors = {}

    def make(name: str, *shape: int, size: float) -> None:
        layout = call.layouts[len(made) % len(call.layouts)]
        layout = "permuted" if name == "qkv" and layout == "packed" else layout
        x = (torch.randn(shape, generator=generator) * size).to(call.dtype)
        made[name] = lay(x, layout) if x.ndim > 1 else x

    def projection(prefix: str, length: int, width: int) -> None:
        make(f"{prefix}x", batch, length, width, size=1.0)
        make(f"{prefix}weight", 2 * heads * dim, width, size=width**-0.5)
        with torch.no_grad():
            sizes = made[f"{prefix}weight"].new_tensor((score, value)).repeat_interleave(heads * dim)
            made[f"{prefix}weight"] = made[f"{prefix}weight"] * sizes[:, None]
        if call.has_bias:
            make(f"{prefix}bias", 2 * heads * dim, size=value)

    def pair(prefix: str, length: int) -> None:
        make(f"{prefix}k", batch, heads, length, dim, size=score)
        make(f"{prefix}v", batch, heads, length, dim, size=value)

    if call.own == "packed":
        make("qkv", batch, queries, 3, heads, dim, size=max(score, value))
    else:
        make("q", batch, heads, queries, dim, size=score)
    if call.own == "pair":
        pair("", keys)
    elif call.own == "projection":
        projection("", keys, call.widths[0])
    if call.source == "pair":
        pair("source_", source_keys)
    elif call.source == "projection":
        projection("source_", source_keys, call.widths[1])
        if call.has_factor:
            made["source_rstd"] = torch.rand(batch, source_keys, generator=generator) + 0.25
    if call.source_q == "projected" and call.source == "projection":
        make("source_q_weight", heads * dim, call.widths[1], size=score * call.widths[1] ** -0.5)
    elif call.source_q != "none":
        make("source_q", batch, heads, source_queries, dim, size=score)
    if not isinstance(call.coins, bool):
        coins = torch.tensor(call.coins, dtype=torch.bool)
        made["coins"] = torch.stack((coins, ~coins), 1)[:, 0] if call.seed % 2 else coins
    make("grad", batch, heads, queries, dim, size=gradient)
    return made


def run(call: Call, tensors: Tensors, impl: str, dtype: torch.dtype | None = None) -> Tensors:
    """Outputs, and gradients named `d...`, by name."""
    if dtype is not None:
        tensors = {name: t if name in KEPT else t.to(dtype) for name, t in tensors.items()}
    tensors = tensors | {name: tensors[name].detach().requires_grad_() for name in call.leaves}
    with interpreted(call.fuses):
        out, source_out = associated(call, tensors) if impl == ASSOCIATED else attend(call, tensors, impl)
        leaves = [tensors[name] for name in call.leaves]
        grads = torch.autograd.grad(out, leaves, tensors["grad"], materialize_grads=impl == ASSOCIATED)
    outputs = {"out": out.detach()} | ({} if source_out is None else {"source_out": source_out})
    return outputs | {f"d{name}": grad for name, grad in zip(call.leaves, grads, strict=True)}


def associated(call: Call, t: Tensors) -> tuple[Tensor, None]:
    """Eager torch over the tokens of projections: scores are (q W_k) x', outputs (P x) W_v' + b_v."""
    q, *own = unpack(t["qkv"]) if call.own == "packed" else (t["q"], t.get("k"), t.get("v"))
    rows = []
    for b, coin in enumerate([call.coins] * call.batch if isinstance(call.coins, bool) else call.coins):
        prefix, kind = ("source_", call.source) if coin else ("", call.own)
        if kind != "projection":
            k, v = (t["source_k"], t["source_v"]) if coin else own
            rows.append((q[b] @ k[b].mT * call.factor).softmax(-1) @ v[b])
            continue
        x = t[f"{prefix}x"][b]
        if f"{prefix}rstd" in t:
            x = (x * t[f"{prefix}rstd"][b, :, None]).to(x.dtype)
        k_weight, v_weight = t[f"{prefix}weight"].unflatten(0, (2, call.heads, call.head_dim))
        bias = t.get(f"{prefix}bias", x.new_zeros(2 * call.heads * call.head_dim))
        k_bias, v_bias = bias.view(2, call.heads, 1, call.head_dim)
        queries = (q[b] @ k_weight).to(call.dtype).to(x.dtype)
        mixed = (
            (((queries @ x.mT + q[b] @ k_bias.mT) * call.factor).softmax(-1) @ x).to(call.dtype).to(x.dtype)
        )
        rows.append(mixed @ v_weight.mT + v_bias)
    return torch.stack(rows), None


def attend(call: Call, t: Tensors, impl: Any) -> tuple[Tensor, Tensor | None]:
    """The call itself."""
    own: KV = None
    if call.own == "pair":
        own = t["k"], t["v"]
    elif call.own == "projection":
        own = Projection(t["x"], t["weight"], t.get("bias"))
    source: KV = None
    if call.source == "pair":
        source = t["source_k"], t["source_v"]
    elif call.source == "projection":
        parts = (t["source_weight"], t.get("source_bias"), t.get("source_rstd"))
        source = Projection(t["source_x"], *parts)
    source_q: Tensor | Projection | None = t.get("source_q")
    if "source_q_weight" in t:
        source_q = Projection(t["source_x"], t["source_q_weight"], None, t.get("source_rstd"))
    coins = call.coins if isinstance(call.coins, bool) else t["coins"]
    q = t["qkv"] if call.own == "packed" else t["q"]
    if impl == WIDE:
        impl, own, source = "reference", rounded(call, own), rounded(call, source)
        if isinstance(source_q, Projection):
            source_q = project(source_q, call.heads, parts=1)[0].to(call.dtype).to(q.dtype)
    if impl == "reference" and q.ndim == 5:
        q, *kv = unpack(q)
        own = (kv[0], kv[1])
    if source_q is None:
        return stochca_attention(q, own, source, coins, scale=call.scale, impl=impl), None
    return stochca_attention(q, own, source, coins, source_q=source_q, scale=call.scale, impl=impl)


def rounded(call: Call, side: KV) -> KV:
    """Keys and values of one side, those that are projected rounded to the dtype of the call."""
    if not isinstance(side, Projection):
        return side
    k, v = pair_of(side, call.heads)
    return k.to(call.dtype).to(k.dtype), v.to(call.dtype).to(v.dtype)


@contextlib.contextmanager
def interpreted(fuses: bool = False) -> Iterator[None]:
    """Where kernels may run in the interpreter: numpy warns of what overflows in rows that are not kept."""
    with (
        mock.patch.dict(os.environ, {"STOCHCA_FUSED_PROJECTION": "1" if fuses else "0"}),
        warnings.catch_warnings(),
    ):
        warnings.simplefilter("ignore")
        yield
