"""An ablation computes the same step, and leaves out of it what it says."""

import itertools

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from bench.cost import Savings, Size, step_flops
from bench.counts import saved_bytes
from bench.step import savings
from bench.step.workloads import TINY, Setting
from stochca import StochCA
from tests.steps import assert_same, outcome

VARIANTS = {
    "all_rows": Savings(class_rows=False),
    "full_source": Savings(full_source=True),
    "source_first": Savings(),
    "own_pairs": Savings(own_kv=True),
    "pairs_for_rows": Savings(row_kv=True),
    "unpacked": Savings(),
}
DRAWS = list(itertools.product((False, True), repeat=4))


@pytest.fixture(scope="module")
def setting():
    return Setting.make(TINY, torch.device("cpu"))


@pytest.mark.parametrize("name", [*VARIANTS, "all_gradients"])
def test_every_variant_computes_the_same_step(name, setting):
    variant = getattr(savings, name)(setting)
    ours = StochCA(setting.target, setting.source).train()
    for coins in DRAWS[::3]:
        expected = outcome(lambda x, c: ours(x, coins=c), setting, coins)
        assert_same(outcome(variant, setting, coins), expected)


@pytest.mark.parametrize("name", VARIANTS)
def test_what_a_variant_computes_is_what_is_counted_for_it(name):
    setting = Setting.make(TINY, torch.device("cpu"))
    variant = getattr(savings, name)(setting)
    variant.model.to("meta")
    images = setting.images.to("meta")
    size = Size.of(setting.target)
    more = 0
    for coins in DRAWS:
        with FlopCounterMode(display=False) as counter:
            variant(images, coins).sum().backward()
        wanted = TINY.batch * step_flops(size, coins, **vars(VARIANTS[name]))
        assert counter.get_total_flops() == wanted, coins
        more += wanted - TINY.batch * step_flops(size, coins)
    assert (more > 0) == (VARIANTS[name] != Savings())


def test_gradients_that_are_dropped_are_computed(setting):
    """Those of the source's keys and values, which torch's counter sees on the meta device."""
    work = {}
    for name, forward in (("ours", savings.unpacked), ("all", savings.all_gradients)):
        variant = forward(Setting.make(TINY, torch.device("cpu")))
        variant.model.to("meta")
        with FlopCounterMode(display=False) as counter:
            variant(setting.images.to("meta"), (True, True, False, False)).sum().backward()
        work[name] = counter.get_total_flops()
    assert work["all"] > work["ours"]


def test_a_source_that_runs_first_and_unpacked_gradients_keep_no_less(setting):
    parameters = [*setting.target.parameters(), *setting.source.parameters()]
    ours = StochCA(setting.target, setting.source).train()
    for name in ("source_first", "unpacked"):
        variant = getattr(savings, name)(setting)
        for coins in DRAWS[1::4]:
            kept = saved_bytes(lambda v=variant, c=coins: v(setting.images, c), parameters)
            assert kept >= saved_bytes(lambda c=coins: ours(setting.images, coins=c), parameters)
