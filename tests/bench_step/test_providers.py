"""What is timed computes what it says, with the work that is counted for it."""

import copy
import weakref
from dataclasses import replace
from functools import partial

import pytest
import torch
from torch._dynamo.testing import CompileCounter
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from bench.cost import Size
from bench.step import by_hand, measure, published, reference
from bench.step.check import relative_errors
from bench.step.providers import BY_HAND_EAGER, OURS, PLAIN, PROVIDERS
from bench.step.reference import Reference
from bench.step.training import TrainingStep, make_optimizer
from bench.step.workloads import TINY, Setting
from tests import plain
from tests.bench_step.common import BF16, CPU, F32, MIXED


def test_the_definition_is_the_one_of_the_tests(setting):
    """Two texts that share no line."""
    exact = Reference(setting)(MIXED)
    target, source = (copy.deepcopy(model).double() for model in (setting.target, setting.source))
    logits = plain.logits(target, source, setting.images.double(), MIXED)
    torch.testing.assert_close(exact.logits, logits.detach(), rtol=1e-12, atol=1e-12)
    torch.nn.functional.cross_entropy(logits, setting.labels).backward()
    torch.testing.assert_close(exact.gradients, reference.flat_gradients(target), rtol=1e-10, atol=1e-12)


def test_a_batch_in_parts_is_the_whole_batch(setting, monkeypatch):
    whole = Reference(setting)
    monkeypatch.setattr(reference, "MAX_NUMBERS", 1)
    parts = Reference(setting)
    assert (whole.at_once, parts.at_once) == (pytest.approx(whole.at_once, abs=1e9), 1)
    assert whole.at_once >= TINY.batch
    for actual, wanted in zip(parts(MIXED), whole(MIXED), strict=True):
        torch.testing.assert_close(actual, wanted, rtol=1e-11, atol=1e-13)


def test_a_setting_is_the_same_again(setting):
    again = Setting.make(TINY, CPU)
    torch.testing.assert_close(again.images, setting.images, rtol=0, atol=0)
    for name in ("target", "source"):
        for p, q in zip(getattr(again, name).parameters(), getattr(setting, name).parameters(), strict=True):
            torch.testing.assert_close(p, q, rtol=0, atol=0)


def test_the_optimizer_leaves_the_weights(setting):
    before = [p.clone() for p in setting.target.parameters()]
    optimizer = make_optimizer(setting)
    step = TrainingStep(lambda images, coins: setting.target(images), setting, optimizer, F32)
    step.forward_backward(MIXED)
    assert any(p.grad.any() for p in setting.target.parameters())
    step.update()
    assert all(p.grad is None for p in setting.target.parameters())
    assert all(map(torch.equal, before, setting.target.parameters()))
    assert {int(state["step"]) for state in optimizer.state.values()} == {2}, "once to make its state"


@pytest.mark.parametrize(("dtype", "least", "most"), [(F32, 1e-8, 1e-5), (BF16, 1e-3, 5e-2)])
def test_arithmetic_is_that_of_the_case(tiny, dtype, least, most):
    errors = relative_errors(tiny.eager_outcome(dtype, MIXED), tiny.reference(MIXED))
    assert all(least < error < most for error in errors.values())


@pytest.mark.filterwarnings("ignore:The .grad attribute")  # torch looks at it while it compiles
def test_by_hand_coins_recompile_nothing(setting, monkeypatch):
    counter = CompileCounter()
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend=counter))
    forward = by_hand.ByHand(setting.target, setting.source, compiled=True)
    for coins in (MIXED, MIXED[::-1], (True,) * 4, (False,) * 4, (False, True, False, True)):
        forward(setting.images, coins)
    torch.compiler.reset()
    assert counter.frame_count == 3  # self, cross, and the source


@pytest.mark.parametrize("coins", [(False,) * 4, (True,) * 4, MIXED], ids=["self", "cross", "mixed"])
@pytest.mark.parametrize("name", [PLAIN, BY_HAND_EAGER, "as published", OURS])
def test_work_is_what_torch_counts(setting, name, coins):
    provider = PROVIDERS[name]
    forward = provider.build(setting)
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        forward(setting.images, coins).sum().backward()
    setting.target.zero_grad(set_to_none=True)
    per_image = measure.provider_flops(provider, Size.of(setting.target), [coins])
    assert counter.get_total_flops() == TINY.batch * per_image


def test_by_hand_keeps_no_queries_of_the_source(setting):
    _, k, v = by_hand.source_block(setting.source.blocks[0], by_hand.embed(setting.source, setting.images))
    assert k.untyped_storage().data_ptr() == v.untyped_storage().data_ptr()
    assert k.untyped_storage().nbytes() == k.nbytes + v.nbytes


def test_by_hand_has_a_bias_or_none():
    workload = replace(TINY, kwargs={**TINY.kwargs, "qkv_bias": False})
    bare = Setting.make(workload, CPU)
    logits = by_hand.ByHand(bare.target, bare.source)(bare.images, MIXED)
    wanted = plain.logits(bare.target, bare.source, bare.images, MIXED)
    torch.testing.assert_close(logits, wanted, rtol=1e-4, atol=1e-4)


def test_the_authors_keep_nothing_of_the_target(setting, monkeypatch):
    """Without gradients, only those of one block exist at a time."""
    project, made, alive = published._project, [], []

    def watched(block, y):
        triple = project(block, y)
        if block in set(setting.target.blocks):
            alive.append(sum(tensor() is not None for tensor in made))
            made.append(weakref.ref(triple[1]))
        return triple

    monkeypatch.setattr(published, "_project", watched)
    with torch.no_grad():
        published.forward(setting.target, setting.source, setting.images, MIXED)
    assert len(alive) == 4
    assert max(alive) == 1


def test_plain_knows_no_coins():
    assert PROVIDERS[PLAIN].coins(MIXED) == (False,) * 4
    assert PROVIDERS[OURS].coins(MIXED) == MIXED
