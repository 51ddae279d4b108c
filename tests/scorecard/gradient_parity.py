"""Gradients of a step that recomputes, is compiled or runs under autocast, beside those of the eager step."""

import copy
import itertools
from collections.abc import Iterable, Iterator
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from stochca import StochCA
from tests import plain
from tests.models import make_images, make_model
from tests.scorecard.row import Case, Figures

MODELS = {
    "class-token": {},
    "average-pool": {"global_pool": "avg"},
    "qk-norm-and-layer-scale": {"qk_norm": True, "init_values": 0.5},
    "rope": {"name": "eva02_small_patch14_224"},
    "dropout": {"drop_path_rate": 0.3, "proj_drop_rate": 0.2},
    "stochastic-depth": {"drop_path_rate": 0.3, "global_pool": "avg"},
}
# Which the plain computation does not draw.
RANDOM = ("dropout", "stochastic-depth")
COINS = {
    "self": (False,) * 4,
    "cross": (True,) * 4,
    "mixed": (False, True, False, True),
    "samples": (torch.tensor([True, False]), True, torch.tensor([False, True]), False),
}
# Whether the step recomputes norms, activations and pairs, and whether it checkpoints its blocks.
WAYS = list(itertools.product([False, True], repeat=2))
DTYPES = {"float32": None, "bfloat16": torch.bfloat16, "float16": torch.float16}
NEAR = 1e-6


class Step(NamedTuple):
    """Logits, and the gradients of all parameters by name."""

    logits: Tensor
    gradients: dict[str, Tensor]

    @property
    def whole(self) -> Tensor:
        """The gradients as one vector, in float64."""
        return torch.cat([grad.double().flatten() for grad in self.gradients.values()])


def cases(long: bool) -> Iterable[Case]:
    if not long:
        for name in ("class-token", "qk-norm-and-layer-scale", "rope", "dropout"):
            yield Case(name, partial(eager, name, ["cross", "samples"], ["float32", "bfloat16"]))
        yield Case("aot_eager", partial(compiled, "stochastic-depth", "aot_eager", ["mixed"], WAYS[::3]))
        return
    for name in MODELS:
        yield Case(name, partial(eager, name, list(COINS), list(DTYPES)))
        yield Case(f"{name}-aot_eager", partial(compiled, name, "aot_eager", list(COINS)))
    for name in ("average-pool", "rope"):
        yield Case(f"{name}-inductor", partial(compiled, name, "inductor", ["self", "cross", "mixed"]))


def eager(name: str, patterns: list[str], dtypes: list[str]) -> Figures:
    """Every way gives the bits of the eager step, which is as near to float64 as timm's blocks are."""
    model = make_model(dtype=torch.float32, **MODELS[name])
    ratios = {}
    for pattern in patterns:
        coins = COINS[pattern]
        exact = None if name in RANDOM else _plain(model, coins, torch.float64)
        for label in dtypes:
            dtype = DTYPES[label]
            expected = _run(model, coins, dtype)
            for way in WAYS[1:]:
                _assert_equal_bits(_run(model, coins, dtype, way), expected, f"{pattern}, {label}, {way}")
            if exact is None:
                continue
            ratio = _error(expected, exact) / _error(_plain(model, coins, torch.float32, dtype), exact)
            assert ratio <= 2, f"{pattern}, {label}: {ratio:.2g} times the error of timm's eager blocks"
            ratios[f"{label}_error_ratio"] = max(ratios.get(f"{label}_error_ratio", 0.0), ratio)
    return {"cases": len(WAYS) * len(patterns) * len(dtypes), **ratios}


def compiled(name: str, backend: str, patterns: list[str], ways: list[tuple[bool, bool]] = WAYS) -> Figures:
    """A step of compiled blocks is as near to the eager one as rounding is; in every way the same."""
    model = make_model(dtype=torch.float32, **MODELS[name])
    expected = {pattern: _run(model, COINS[pattern]) for pattern in patterns}
    torch._dynamo.reset()
    model.compile(backend=backend, fullgraph=True)
    worst, count = 0.0, 0
    for pattern, way in itertools.product(patterns, ways):
        step = _run(model, COINS[pattern], way=way)
        error = _error(step, expected[pattern])
        assert error <= NEAR, f"{pattern}, {way}: {error:.2g} from the eager step"
        for parameter, off in _parameters_off(step, expected[pattern]):
            raise AssertionError(f"{pattern}, {way}: the gradient of {parameter} is {off:.2g} off")
        worst, count = max(worst, error), count + 1
    torch._dynamo.reset()
    return {"cases": count, "compiled_relative_error": worst}


def _run(
    model: StochCA, coins: tuple, dtype: torch.dtype | None = None, way: tuple[bool, bool] = WAYS[0]
) -> Step:
    model.recompute, checkpointing = way
    model.set_grad_checkpointing(checkpointing)
    torch.manual_seed(0)
    with torch.autocast("cpu", dtype or torch.bfloat16, enabled=dtype is not None):
        logits = model(make_images(dtype=torch.float32), coins=coins)
    return Step(logits, plain.gradients(model.target, logits))


def _plain(model: StochCA, coins: tuple, dtype: torch.dtype, autocast: torch.dtype | None = None) -> Step:
    """The step as timm's own modules and torch's attention compute it, block after block."""
    target, source = (copy.deepcopy(part).to(dtype) for part in (model.target, model.source))
    with torch.autocast("cpu", autocast or torch.bfloat16, enabled=autocast is not None):
        logits = plain.logits(target, source, make_images(dtype=dtype), coins, _select)
    return Step(logits, plain.gradients(target, logits))


def _select(q: Tensor, own: tuple, source: tuple, coin: bool | Tensor) -> Tensor:
    if isinstance(coin, bool):
        return F.scaled_dot_product_attention(q, *(source if coin else own))
    both = [F.scaled_dot_product_attention(q, *pair) for pair in (own, source)]
    return torch.where(coin[:, None, None, None], both[1], both[0])


def _error(step: Step, expected: Step) -> float:
    """Of logits and of the gradients as one vector, the larger, relative to their norms."""
    pairs = ((step.logits.double(), expected.logits.double()), (step.whole, expected.whole))
    return max(((actual - wanted).norm() / wanted.norm()).item() for actual, wanted in pairs)


def _parameters_off(step: Step, expected: Step) -> Iterator[tuple[str, float]]:
    """Parameters of which the gradient differs by more than ten times as much, small ones by less."""
    floor = 0.1 * NEAR * expected.whole.norm().item()
    for name, wanted in expected.gradients.items():
        difference, norm = (step.gradients[name] - wanted).norm().item(), wanted.norm().item()
        if not difference <= 10 * NEAR * norm + floor:
            yield name, difference / max(norm, floor)


def _assert_equal_bits(step: Step, expected: Step, where: str) -> None:
    assert torch.equal(step.logits, expected.logits), f"{where}: other logits"
    for name, wanted in expected.gradients.items():
        assert torch.equal(step.gradients[name], wanted), f"{where}: another gradient of {name}"
