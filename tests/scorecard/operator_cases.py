"""Random calls of the operator against float64, by the measure of eager torch."""

import math
from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from hypothesis import HealthCheck, Phase, given, seed, settings
from torch import Tensor

from stochca_kernels import Projection
from stochca_kernels.projection import pair_of, project, unpack
from stochca_kernels.testing import assert_close_to_exact
from tests.scorecard.operator_calls import (
    ASSOCIATED,
    KEPT,
    OUTPUTS,
    WIDE,
    Call,
    Tensors,
    calls,
    run,
    tensors_of,
)
from tests.scorecard.row import Case, Figures

# Slices of each implementation, and calls of each slice.
LONG = {"sdpa": (32, 40), "triton": (48, 15)}
SHORT = {"sdpa": (1, 30), "triton": (1, 3)}
# Scores that a log-sum-exp in float32 resolves to an eighth: of larger ones it knows no probability.
RESOLVED = 2**20
FLOAT32 = torch.finfo(torch.float32).eps


def cases(long: bool) -> Iterator[Case]:
    for impl, (slices, examples) in (LONG if long else SHORT).items():
        for i in range(slices):
            yield Case(f"{impl} {i}", _slice(impl, i, examples))


def _slice(impl: str, i: int, examples: int) -> Callable[[], Figures]:
    def check() -> Figures:
        ran = 0

        @seed(i)
        @settings(
            max_examples=examples,
            derandomize=True,
            database=None,
            deadline=None,
            phases=(Phase.generate,),
            suppress_health_check=list(HealthCheck),
            report_multiple_bugs=False,
        )
        @given(calls(impl))
        def every_call_is_accurate(call: Call) -> None:
            nonlocal ran
            assert_accurate(call)
            ran += 1

        every_call_is_accurate()
        return {"cases": ran}

    return check


def assert_accurate(call: Call) -> None:
    """Assert that outputs and gradients are as near to float64 as eager torch, and finite where that is.

    Where few rows ask projections, keys and values may be left out: eager torch has then computed with keys
    and values and without, and the larger of its errors counts.

    Eager torch keeps scores in the dtype of the inputs, where large ones overflow. There its results in
    float32, rounded, take their place: more is then computed than eager torch can, and it has to be right.
    What is projected is rounded there as well.

    Gradients start from a log-sum-exp in float32, which tells probabilities apart while scores are below
    `RESOLVED`; beyond, outputs alone are compared. In float16 gradients have to be finite where the products
    of the output's gradient with the values are, in whatever order they are added up.
    """
    tensors = tensors_of(call)
    actual = run(call, tensors, call.impl)
    exact = run(call, tensors, "reference", torch.float64)
    eager = run(call, tensors, "reference")
    yardsticks = [widened(call, tensors, eager, WIDE)]
    if call.is_associated:
        yardsticks.append(widened(call, tensors, run(call, tensors, ASSOCIATED), ASSOCIATED))
    least = floors(call, tensors)
    largest = torch.finfo(call.dtype).max
    for name, value in actual.items():
        if name not in OUTPUTS and least.scores > RESOLVED:
            continue
        holds = exact[name].abs() <= largest
        if name in OUTPUTS or least.products < largest:
            lost = eager[name].isfinite() & holds & ~value.isfinite()
            assert not lost.any(), (
                f"{name}: {lost.sum()} elements are not finite where those of eager torch are"
            )
        made_up = (exact[name].abs() > 1.01 * largest) & value.isfinite()
        assert not made_up.any(), f"{name}: {made_up.sum()} elements are finite, and beyond {call.dtype}"
        holds &= value.isfinite() & torch.stack([t[name].isfinite() for t in yardsticks if name in t]).all(0)
        value, known = value[holds], exact[name][holds]
        yardstick = max(
            (t[name][holds] for t in yardsticks if name in t),
            key=lambda t: _largest((t.double() - known).abs()),
        )
        try:
            factor = 2.0 if name in OUTPUTS else 3.0
            assert_close_to_exact(value, yardstick, known, factor=factor)
        except AssertionError as error:
            allowed = least.errors.get(name, least.spacing)
            if (value.double() - known).abs().max() > allowed:
                raise AssertionError(f"{name}: {error}, {allowed:.3g} is allowed") from None


def widened(call: Call, tensors: Tensors, eager: Tensors, impl: str) -> Tensors:
    """What eager torch computed, in float32 where that is not finite."""
    if all(t.isfinite().all() for t in eager.values()):
        return eager
    wide = run(call, tensors, impl, torch.float32)
    return {name: torch.where(t.isfinite(), t, wide[name].to(t.dtype)) for name, t in eager.items()}


class Floors(NamedTuple):
    """What no implementation can be better than.

    Args:
        errors: That are always allowed, by the name of an output or a gradient.
        spacing: Of numbers below the normal ones of the dtype, an error that is allowed everywhere.
        scores: The largest of all scores.
        products: What the output's gradient times values may come to on the way.
    """

    errors: dict[str, float]
    spacing: float
    scores: float
    products: float


def floors(call: Call, tensors: Tensors) -> Floors:
    """What may be off beside one rounding of the largest element, in each output and gradient.

    An output is a mean of values, which may cancel: each of its terms is rounded once. So may the gradient
    of a score, a difference `P (grad v' - rowsum(grad * out))`, as it does where there is one key: both terms
    are rounded once, and the probabilities `P` by as much as a log-sum-exp in float32 is. Counted is what
    that comes to, at most, in all that is made of it.
    """
    spacing = torch.finfo(call.dtype).smallest_normal * torch.finfo(call.dtype).eps
    t = {name: x if name in KEPT else x.double() for name, x in tensors.items()}
    own, source = None, None
    if call.own == "packed":
        q, *own = unpack(t["qkv"])
    else:
        q, own = t["q"], [t[name] for name in "kv"] if call.own == "pair" else None
    if call.own == "projection":
        own = pair_of(Projection(t["x"], t["weight"], t.get("bias")), call.heads)
    if call.source == "pair":
        source = [t[f"source_{name}"] for name in "kv"]
    elif call.source == "projection":
        parts = (t.get(f"source_{name}") for name in ("x", "weight", "bias", "rstd"))
        source = pair_of(Projection(*parts), call.heads)
    coins = t["coins"] if "coins" in t else torch.full((call.batch,), call.coins is True)
    rounding = torch.finfo(call.dtype).eps / 2
    out, source_out = torch.zeros_like(q), torch.zeros(0)
    dq, dk, dv = torch.zeros_like(q), torch.zeros(0), torch.zeros(0)
    most_scores = products = 0.0
    for side, chosen in ((own, ~coins), (source, coins)):
        if side is not None and chosen.any():
            k, v = side
            scores = q @ k.mT * call.factor
            most_scores = max(most_scores, _largest(scores[chosen].abs()))
            probs = scores.softmax(-1) * chosen[:, None, None, None]
            out += probs @ v.abs() * rounding
            terms = t["grad"].abs() @ v.abs().mT
            weights = _largest(t["grad"].abs().sum(-1)) * max(_largest(v.abs()), *_value_weights(t))
            products = max(products, 4 * _largest(terms), 4 * weights)
            of_lse = math.expm1(min(FLOAT32 * _largest(scores[chosen].abs()), 700.0))
            of_terms = probs * terms * (4 * rounding + of_lse)
            dq += of_terms @ k.abs() * abs(call.factor)
            if side is own:
                dk = of_terms.mT @ q.abs() * abs(call.factor)
                dv = probs.mT @ t["grad"].abs() * of_lse
                if call.own == "projection":  # through which they go on, rounded
                    dv += (probs.mT @ t["grad"]).abs() * 2 * rounding
    if call.source_q != "none":
        k, v = source
        source_q = t.get("source_q")
        if source_q is None:
            asking = Projection(t["source_x"], t["source_q_weight"], None, t.get("source_rstd"))
            (source_q,) = project(asking, call.heads, parts=1)
        source_out = (source_q @ k.mT * call.factor).softmax(-1) @ v.abs() * rounding
    found = {"out": out, "source_out": source_out, "dq": dq, "dk": dk, "dv": dv}
    found["dqkv"] = torch.cat((dq.flatten(), dk.flatten(), dv.flatten()))
    if call.own == "projection" and dk.numel() > 0:
        rows = torch.cat([x.transpose(1, 2).flatten(2) for x in (dk, dv)], -1)
        found["dbias"] = rows.sum((0, 1))
        found["dweight"] = rows.flatten(0, 1).mT @ t["x"].abs().flatten(0, 1)
        found["dx"] = rows @ t["weight"].abs()
    errors = {name: max(spacing, _largest(x)) for name, x in found.items()}
    return Floors(errors, spacing, most_scores, products)


def _value_weights(t: Tensors) -> list[float]:
    """The largest weight of values of each projection, and zero."""
    named = (t[name] for name in ("weight", "source_weight") if name in t)
    return [0.0, *(_largest(weight.chunk(2)[1].abs()) for weight in named)]


def _largest(x: Tensor) -> float:
    return x.max().item() if x.numel() > 0 else 0.0
