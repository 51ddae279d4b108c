"""NaN and infinity: where they come out, and that they come from nowhere else than what is read.

Of outputs and of gradients the set of the elements that are not finite is compared with that of the
reference in float64, for one NaN, +inf or -inf in one element of one input. Which of the three comes out is
compared for outputs of a NaN alone: the reference adds up infinities of both signs in an order of its own.

Left out is what cancels and is not computed: the key bias and its gradient, and for few rows, which compute
no values either, the gradient of the value bias and all gradients through it. So are the gradients of SDPA
for infinities: torch's own, it gives other values none where a score is infinite. An infinity may spread less
through gradients of few rows, where the reference computes keys and values that meet it; never further.
"""

import math
from collections.abc import Iterator

import torch

from tests.gpu import paths
from tests.kernels.test_triton import inside_nan
from tests.scorecard.operator_calls import OUTPUTS, Call, Tensors, run, tensors_of
from tests.scorecard.row import Case, Figures

VALUES = {"NaN": math.nan, "+inf": math.inf, "-inf": -math.inf}
MIXED = (False, True, True)
# Every path: on chip, streamed, one kernel for the backward and two, fused, and few rows without keys.
FORMS = {
    "pair": {"source_q": "given"},
    "long pair": {"lengths": (5, 300, 290, 4)},
    "wide pair": {"head_dim": 72},
    "packed": {"own": "packed", "lengths": (20, 20, 30, 20)},
    "projection": {"own": "projection", "lengths": (20, 30, 25, 20)},
    "projected source": {"source": "projection", "has_factor": True, "source_q": "projected"},
    "fused source": {"source": "projection", "has_factor": True, "source_q": "projected", "fuses": True},
    "few rows": {"own": "projection", "source": "projection", "has_factor": True, "lengths": (2, 30, 25, 1)},
    "few rows of two widths": {
        "own": "projection", "source": "projection", "lengths": (2, 30, 25, 1), "widths": (24, 16),
    },
}  # fmt: skip
COINS = {"self": False, "cross": True, "mixed": MIXED}


def cases(long: bool) -> Iterator[Case]:
    for impl in ("sdpa", "triton"):
        for name, form in FORMS.items():
            call = Call(
                impl, torch.float32, **{"batch": 3, "lengths": (20, 30, 25, 20), "coins": MIXED, **form}
            )
            for coin, coins in COINS.items():
                if long or (coin == "mixed" and impl == "sdpa"):
                    asked = call._replace(coins=coins)
                    yield Case(f"{impl}, {name}, {coin}", lambda call=asked, long=long: _spread(call, long))
            if long or name in ("pair", "few rows", "fused source"):
                yield Case(f"{impl}, {name}, leaks", lambda call=call: _leaks(call))
    if not long:
        call = Call("triton", torch.float32, batch=3, coins=MIXED)
        yield Case("triton, pair, mixed", lambda: _spread(call, every=False))


def _spread(call: Call, every: bool) -> Figures:
    """Put each value into each input, at one place; without `every` NaN alone."""
    tensors = tensors_of(call)
    count = 0
    for name in tensors:
        if name != "coins":
            for kind in VALUES if every else ("NaN",):
                place = _place(call, name, tensors[name])
                changed = tensors[name].clone()
                changed[place] = VALUES[kind]
                _assert_same_set(call, tensors | {name: changed}, name, kind)
                count += 1
    return {"cases": count}


def _place(call: Call, name: str, tensor: torch.Tensor) -> tuple[int, ...]:
    """The middle of each axis; of a bias, in its half of the values."""
    if name in ("bias", "source_bias"):
        return (3 * tensor.shape[0] // 4,)
    return tuple(n // 2 for n in tensor.shape)


def _assert_same_set(call: Call, tensors: Tensors, changed: str, kind: str) -> None:
    is_few, of_bias = call.lengths[0] < call.head_dim, changed.endswith("bias")
    actual = run(call, tensors, call.impl)
    exact = run(call, tensors, "reference", torch.float64)
    for name, value in actual.items():
        expected = exact[name]
        if is_few and (name == "dbias" or (of_bias and name not in OUTPUTS)):
            continue
        if call.impl == "sdpa" and kind != "NaN" and name not in OUTPUTS:
            continue
        if name == "dbias":  # that of the values
            value, expected = value.chunk(2)[1], expected.chunk(2)[1]
        differ = value.isfinite() != expected.isfinite()
        if is_few and kind != "NaN" and name not in OUTPUTS:
            differ &= ~value.isfinite()
        if kind == "NaN" and name in OUTPUTS:
            differ |= value.isnan() != expected.isnan()
        assert not differ.any(), (
            f"{kind} in {changed}: {name} is finite at {value.isfinite().sum()} of {value.numel()} elements, "
            f"the other one at {expected.isfinite().sum()}; first {differ.nonzero()[0].tolist()} differs"
        )


def _leaks(call: Call) -> Figures:
    """NaN where no program may read: memory behind rows and what was allocated, then pairs of other coins."""
    tensors = tensors_of(call)
    expected = run(call, tensors, call.impl)
    assert all(t.isfinite().all() for t in expected.values())
    surrounded = {name: t if name == "coins" else inside_nan(t) for name, t in tensors.items()}
    unselected = _poison_unselected(call, surrounded)
    for what, changed in {"memory around": surrounded, "pairs of other coins": unselected}.items():
        with paths.poisoned():
            results = run(call, changed, call.impl)
        for name, t in results.items():
            assert torch.equal(t, expected[name]), f"NaN in {what} changes {name}"
    return {"cases": 2, "leaks": 0}


def _poison_unselected(call: Call, tensors: Tensors) -> Tensors:
    """NaN in the samples of either side that no coin selects; the source's are read where its queries ask."""
    coins = tensors["coins"]
    result = dict(tensors)
    for name in ("k", "v", "x"):
        if name in tensors:
            result[name] = _with_nan(tensors[name], coins)
        if f"source_{name}" in tensors and call.source_q == "none":
            result[f"source_{name}"] = _with_nan(tensors[f"source_{name}"], ~coins)
    return result


def _with_nan(tensor: torch.Tensor, samples: torch.Tensor) -> torch.Tensor:
    """As `tensor`, in the same layout."""
    changed = inside_nan(tensor)
    changed[samples] = math.nan
    return changed
