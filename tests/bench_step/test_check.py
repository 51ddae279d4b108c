"""Nobody who is wrong is timed."""

import math
from collections import Counter
from dataclasses import replace

import pytest
import torch

from bench.cost import Size, representative_draws
from bench.step.check import Check, Wrong, draws_to_check, largest_unit, relative_errors
from bench.step.providers import BY_HAND_EAGER, OURS, PLAIN, PROVIDERS
from bench.step.reference import Outcome
from bench.step.training import TF32Step
from tests.bench_step.common import BF16, CPU, F32, MIXED, SETTINGS, measured, spoiled


@pytest.mark.parametrize("dtype", [F32, BF16], ids=["f32", "bf16"])
@pytest.mark.parametrize("block", range(4))
def test_one_wrong_coin_is_noticed(tiny, dtype, block):
    check = Check(tiny.reference, tiny.eager_outcome)
    flipped = tuple(coin ^ (i == block) for i, coin in enumerate(MIXED))
    check(tiny.eager_outcome(dtype, MIXED), dtype, MIXED)
    wrong = tiny.eager_outcome(dtype, flipped)
    with pytest.raises(Wrong, match="relative error"):
        check(wrong, dtype, MIXED)
    exact, unit = check.unit(dtype, MIXED)
    errors = relative_errors(wrong, exact)
    assert all(errors[name] > 3 * unit[name] for name in errors), "in logits as well as in gradients"


class Halved(torch.autograd.Function):
    """Right forwards, wrong backwards."""

    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, grad):
        return 0.5 * grad


@pytest.mark.parametrize(
    "spoil",
    [
        lambda forward, images, coins: 1.001 * forward(images, coins),
        lambda forward, images, coins: forward(images, coins) * float("nan"),
        lambda forward, images, coins: forward(images, coins)[:, :-1],
        lambda forward, images, coins: forward(images, [not coin for coin in coins]),
        lambda forward, images, coins: Halved.apply(forward(images, coins)),
    ],
    ids=["scaled", "NaN", "too few", "other coins", "gradients"],
)
def test_who_is_wrong_is_not_timed(tiny, monkeypatch, spoil):
    found = measured(monkeypatch, tiny, spoiled(spoil))
    entry = found["providers"][OURS]
    assert entry.keys() == {"status", "reason"}
    assert entry["status"] in ("wrong", "failed")
    assert {found["providers"][name]["status"] for name in (PLAIN, BY_HAND_EAGER)} == {"timed"}
    assert found["ratios"] == {}


def test_who_is_not_exact_says_by_how_much(tiny, monkeypatch):
    def off(forward, images, coins):
        return (1 + 1e-5) * forward(images, coins)

    assert measured(monkeypatch, tiny, spoiled(off))["providers"][OURS]["status"] == "wrong"
    generous = spoiled(off, allowed={"logits": 1e3, "gradients": 1e3})
    entry = measured(monkeypatch, tiny, generous)["providers"][OURS]
    assert entry["status"] == "timed"
    assert 2 < entry["error"]["logits"] < 1e3


def test_a_wrong_unit_excuses_nobody(tiny, monkeypatch):
    flipped = spoiled(lambda forward, images, coins: forward(images, coins[::-1]), name=BY_HAND_EAGER)
    entries = measured(monkeypatch, tiny, flipped, PROVIDERS[OURS])["providers"]
    assert entries[OURS]["status"] == entries[BY_HAND_EAGER]["status"] == "wrong"
    assert "the unit" in entries[OURS]["reason"]


def draw_between(stage, count=8):
    """Of the draws of a case, one that is not compared with the definition."""
    draws = representative_draws(Size.of(stage.setting.target), 0.5, count)
    return next(coins for coins in draws if coins not in draws_to_check(draws))


def test_every_draw_is_looked_at(tiny, monkeypatch):
    bad = draw_between(tiny)

    def nan_under_one(forward, images, coins):
        return forward(images, coins) * (math.nan if tuple(coins) == bad else 1.0)

    eight = replace(SETTINGS, num_draws=8)
    entry = measured(monkeypatch, tiny, spoiled(nan_under_one), settings=eight)["providers"][OURS]
    assert entry["status"] == "wrong"
    assert "not all are finite under coins " + "".join(str(int(coin)) for coin in bad) in entry["reason"]


def test_a_definition_is_computed_once_per_draw(tiny):
    calls = Counter()

    def exact(coins):
        calls[coins] += 1
        return tiny.reference(coins)

    check = Check(exact, tiny.eager_outcome)
    for dtype in (F32, BF16, F32):
        check(tiny.eager_outcome(dtype, MIXED), dtype, MIXED)
    assert calls == {MIXED: 1}


def test_tf32_is_for_its_own_step_alone(tiny):
    matmul, seen = torch.backends.cuda.matmul, []

    def forward(images, coins):
        seen.append(matmul.allow_tf32)
        if len(seen) == 2:
            raise RuntimeError("in the middle")
        return tiny.setting.target(images)

    step = TF32Step(forward, tiny.setting, tiny.optimizer, F32)
    assert matmul.allow_tf32 is False
    step.outcome(MIXED)
    with pytest.raises(RuntimeError, match="in the middle"):
        step.outcome(MIXED)
    assert seen == [True, True]
    assert matmul.allow_tf32 is False


def test_tf32_is_judged_by_what_rounds_alike(tiny, monkeypatch):
    def off(forward, images, coins):
        return (1 + 2e-4) * forward(images, coins)

    assert measured(monkeypatch, tiny, spoiled(off))["providers"][OURS]["status"] == "wrong"
    entry = measured(monkeypatch, tiny, spoiled(off, tf32=True))["providers"][OURS]
    assert entry["status"] == "timed", entry
    assert entry["mfu"] is None, "at the rate of a product of float32 it would say nothing"


def test_a_convolution_on_a_gpu_may_round_to_tf32(monkeypatch):
    assert largest_unit(F32, CPU) == 2e-5
    assert largest_unit(F32, torch.device("cuda")) == largest_unit(torch.float16, CPU)
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    assert largest_unit(F32, torch.device("cuda")) == 2e-5


def test_the_most_and_the_least_read_draw_is_checked():
    none, one, all_ = (False, False), (True, False), (True, True)
    assert draws_to_check([one, all_, none]) == [all_, none]
    assert draws_to_check([none]) == [none]


def test_errors_are_relative():
    exact = Outcome(torch.tensor([3.0, 4.0]), torch.tensor([0.0, 2.0]))
    off = Outcome(torch.tensor([3.0, 4.5]), torch.tensor([1.0, 2.0]))
    assert relative_errors(off, exact) == pytest.approx({"logits": 0.1, "gradients": 0.5})
