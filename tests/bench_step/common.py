"""What the tests of the benchmark of training steps share."""

from functools import partial

import torch

from bench.step import by_hand, measure
from bench.step.cases import Case
from bench.step.clock import Deadline
from bench.step.measure import Settings
from bench.step.provider import Provider
from bench.step.providers import BY_HAND_EAGER, OURS, PLAIN, PROVIDERS
from bench.step.workloads import TINY

CPU = torch.device("cpu")
F32, BF16 = torch.float32, torch.bfloat16
SETTINGS = Settings(2, 1, Deadline(), {F32: 1e9, BF16: 1e9, torch.float16: 1e9})
MIXED = (False, True, True, False)


def measured(monkeypatch, stage, *providers, p=0.5, dtype=F32, settings=SETTINGS, study="p"):
    """Entries of some providers, and of the eager ones beside them."""
    for provider in providers:
        monkeypatch.setitem(PROVIDERS, provider.name, provider)
    names = [*(provider.name for provider in providers), PLAIN, BY_HAND_EAGER]
    return measure.measure(Case(TINY, p, dtype, study, names), stage, settings)


def spoiled(spoil, name=OURS, **kwargs):
    """The eager rival, its forward changed: `spoil(forward, images, coins)`."""

    def build(setting):
        return partial(spoil, by_hand.ByHand(setting.target, setting.source))

    return Provider(name, build, **kwargs)
