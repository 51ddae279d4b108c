"""A failure hides no other's figures."""

import math
from dataclasses import replace

import pytest
import torch

from bench.step import measure
from bench.step.cases import Case
from bench.step.clock import Deadline
from bench.step.providers import BY_HAND_EAGER, OURS, OURS_COMPILED, PLAIN, PLAIN_COMPILED, PROVIDERS
from bench.step.stage import Stage
from bench.step.training import TrainingStep
from bench.step.workloads import TINY
from tests.bench_step.common import CPU, F32, SETTINGS, measured, spoiled


@pytest.mark.parametrize("calls", [0, 1, 5], ids=["at once", "while checked", "while timed"])
@pytest.mark.parametrize(
    ("error", "status"),
    [
        (IndexError("out of luck"), "failed"),
        (torch.OutOfMemoryError("too much"), "out of memory"),
        (ImportError("not here"), "unsupported"),
    ],
)
def test_who_raises_stops_nobody_else(tiny, monkeypatch, calls, error, status):
    left = iter(range(calls))

    def raising(forward, images, coins):
        if next(left, None) is None:
            raise error
        return forward(images, coins)

    entries = measured(monkeypatch, tiny, spoiled(raising))["providers"]
    assert entries[OURS] == {"status": status, "reason": f"{type(error).__name__}: {error}"}
    assert {entries[name]["status"] for name in (PLAIN, BY_HAND_EAGER)} == {"timed"}


class NanGradient(torch.autograd.Function):
    """Finite in the forward alone."""

    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, grad):
        return torch.full_like(grad, math.nan)


@pytest.mark.parametrize("late", [2, 5, 6], ids=["checked", "timed", "timed again"])
def test_who_spoils_the_weights_spoils_nobody_else(monkeypatch, late):
    """The weights and moments of all are as they were, and the next case is measured."""
    own = Stage(TINY, CPU)
    before = [p.detach().clone() for p in own.setting.target.parameters()]
    left = iter(range(late))

    def nan_at_last(forward, images, coins):
        logits = forward(images, coins)
        return NanGradient.apply(logits) if next(left, None) is None else logits

    entries = measured(monkeypatch, own, spoiled(nan_at_last))["providers"]
    assert entries[OURS]["status"] == "wrong"
    assert {entries[name]["status"] for name in (PLAIN, BY_HAND_EAGER)} == {"timed"}
    assert all(map(torch.equal, before, own.setting.target.parameters()))
    moments = [state[name] for state in own.optimizer.state.values() for name in ("exp_avg", "exp_avg_sq")]
    assert all(moment.isfinite().all() for moment in moments)
    again = measure.measure(Case(TINY, 0.0, F32, "p", [PLAIN, BY_HAND_EAGER]), own, SETTINGS)["providers"]
    assert {entry["status"] for entry in again.values()} == {"timed"}


class Broken(TrainingStep):
    """Fails when it is timed."""

    def update(self):
        raise RuntimeError("no optimizer")


class BrokenBackward(TrainingStep):
    """Fails when it is checked."""

    def forward_backward(self, coins):
        super().forward_backward(coins)
        raise RuntimeError("at the very end")


class Clean(TrainingStep):
    """Wants to begin without gradients."""

    def forward_backward(self, coins):
        assert all(p.grad is None for p in self.setting.target.parameters())
        return super().forward_backward(coins)


def test_who_fails_leaves_no_gradients_to_the_next(tiny, monkeypatch):
    broken = replace(PROVIDERS[OURS], step=Broken)
    clean = replace(PROVIDERS[OURS], step=Clean, name=OURS_COMPILED)
    entries = measured(monkeypatch, tiny, broken, clean)["providers"]
    assert entries[OURS] == {"status": "failed", "reason": "RuntimeError: no optimizer"}
    assert entries[OURS_COMPILED]["status"] == "timed", entries[OURS_COMPILED]


def test_who_fails_last_leaves_no_gradients(tiny, monkeypatch):
    monkeypatch.setitem(PROVIDERS, OURS, replace(PROVIDERS[OURS], step=BrokenBackward))
    found = measure.measure(Case(TINY, 0.5, F32, "p", [OURS]), tiny, SETTINGS)
    assert found["providers"][OURS]["reason"] == "RuntimeError: at the very end"
    assert all(p.grad is None for p in tiny.setting.target.parameters())


def test_a_broken_profiler_costs_no_times(tiny, monkeypatch):
    monkeypatch.setattr(measure, "breakdown", lambda step, coins: 1 / 0)
    entry = measured(monkeypatch, tiny, study="main")["providers"][PLAIN]
    assert entry["status"] == "timed"
    assert entry["breakdown_reason"] == "ZeroDivisionError: division by zero"


def test_compilation_is_begun_only_where_it_can_end(tiny, monkeypatch):
    slow = replace(PROVIDERS[PLAIN], name=PLAIN_COMPILED, compiled=True)
    short = replace(SETTINGS, deadline=Deadline(measure.COMPILE_SECONDS / 2))
    assert (
        measured(monkeypatch, tiny, slow, settings=short)["providers"][slow.name]["status"] == "not reached"
    )
    assert measured(monkeypatch, tiny, slow)["providers"][slow.name]["status"] == "timed"
