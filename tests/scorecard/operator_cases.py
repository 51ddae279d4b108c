"""Random calls of the operator against float64, by the measure of eager torch."""

from collections.abc import Callable, Iterator

import torch
from hypothesis import HealthCheck, Phase, given, seed, settings
from torch import Tensor

from stochca_kernels import Projection
from stochca_kernels.projection import pair_of, unpack
from stochca_kernels.testing import assert_close_to_exact
from tests.scorecard.operator_calls import KEPT, OUTPUTS, Call, Tensors, calls, run, tensors_of
from tests.scorecard.row import Case, Figures

# Slices of each implementation, and calls of each slice.
LONG = {"sdpa": (32, 40), "triton": (48, 15)}
SHORT = {"sdpa": (1, 30), "triton": (1, 3)}


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

    Eager torch keeps scores in the dtype of the inputs, where large ones overflow. There its results in
    float32, rounded, take their place: more is then computed than eager torch can, and it has to be right.
    """
    tensors = tensors_of(call)
    actual = run(call, tensors, call.impl)
    exact = run(call, tensors, "reference", torch.float64)
    eager = run(call, tensors, "reference")
    if not all(t.isfinite().all() for t in eager.values()):
        wide = run(call, tensors, "reference", torch.float32)
        replaced = {name: torch.where(t.isfinite(), t, wide[name].to(t.dtype)) for name, t in eager.items()}
    else:
        replaced = eager
    least = floors(call, tensors)
    largest = torch.finfo(call.dtype).max
    for name, value in actual.items():
        holds = exact[name].abs() <= largest
        lost = eager[name].isfinite() & holds & ~value.isfinite()
        assert not lost.any(), f"{name}: {lost.sum()} elements are not finite where those of eager torch are"
        made_up = (exact[name].abs() > 1.01 * largest) & value.isfinite()
        assert not made_up.any(), f"{name}: {made_up.sum()} elements are finite, and beyond {call.dtype}"
        holds &= value.isfinite() & replaced[name].isfinite()
        value, known = value[holds], exact[name][holds]
        try:
            factor = 2.0 if name in OUTPUTS else 3.0
            assert_close_to_exact(value, replaced[name][holds], known, factor=factor)
        except AssertionError as error:
            if (value.double() - known).abs().max() > least.get(name, 0.0):
                raise AssertionError(
                    f"{name}: {error}; at least {least.get(name, 0):.3g} is allowed"
                ) from None


def floors(call: Call, tensors: Tensors) -> dict[str, float]:
    """The error that is always allowed in each result, beside one rounding of its largest element.

    The gradient of a score is a difference, `P (grad v' - rowsum(grad * out))`, and may cancel, as it does
    where there is one key. Both terms are rounded once: what that comes to, at most, in all that is made of
    it. Eager torch rounds as often, but may be lucky. Numbers below the normal ones of a dtype have a spacing
    of their own.
    """
    spacing = torch.finfo(call.dtype).smallest_normal * torch.finfo(call.dtype).eps
    t = {name: x if name in KEPT else x.double() for name, x in tensors.items()}
    if call.own == "packed":
        q, *own = unpack(t["qkv"])
    else:
        q, own = t["q"], [t[name] for name in "kv"] if call.own == "pair" else None
    if call.own == "projection":
        own = pair_of(Projection(t["x"], t["weight"], t.get("bias")), call.heads)
    source = [t[f"source_{name}"] for name in "kv"] if call.source == "pair" else None
    if call.source == "projection":
        parts = (t.get(f"source_{name}") for name in ("x", "weight", "bias", "rstd"))
        source = pair_of(Projection(*parts), call.heads)
    coins = t["coins"] if "coins" in t else torch.full((call.batch,), call.coins is True)
    dq, dk = torch.zeros_like(q), torch.zeros(0)
    for side, chosen in ((own, ~coins), (source, coins)):
        if side is not None:
            k, v = side
            probs = (q @ k.mT * call.factor).softmax(-1) * chosen[:, None, None, None]
            rounded = 2 * torch.finfo(call.dtype).eps * probs * (t["grad"].abs() @ v.abs().mT)
            rounded *= abs(call.factor)
            dq += rounded @ k.abs()
            dk = rounded.mT @ q.abs() if side is own else dk
    found = {"dq": dq, "dk": dk, "dqkv": torch.cat((dq.flatten(), dk.flatten()))}
    if call.own == "projection":
        rows = dk.transpose(1, 2).flatten(2)
        found["dbias"] = rows.sum((0, 1))
        found["dweight"] = rows.flatten(0, 1).mT @ t["x"].abs().flatten(0, 1)
        found["dx"] = rows @ t["weight"].abs()[: rows.shape[2]]
    return {name: max(spacing, _largest(found.get(name))) for name in (*OUTPUTS, *found, "dv")}


def _largest(x: Tensor | None) -> float:
    return 0.0 if x is None or x.numel() == 0 else x.max().item()
