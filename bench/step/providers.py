"""StochCA, and everybody that it is compared with.

A new one is a function from a `Setting` to a forward `(images, coins) -> logits`, and a line in `PROVIDERS`.
"""

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from bench.cost import BY_HAND, Savings
from bench.step import published
from bench.step.by_hand import ByHand
from bench.step.provider import Provider
from bench.step.training import Forward
from bench.step.workloads import Setting
from stochca import StochCA

OURS, OURS_COMPILED = "ours", "ours compiled"
PLAIN, PLAIN_COMPILED = "plain", "plain compiled"
BY_HAND_EAGER, BY_HAND_COMPILED = "by hand", "by hand compiled"
PUBLISHED, PUBLISHED_AUTOCAST = "as published", "as published, autocast"


def plain(setting: Setting, compiled: bool = False) -> Forward:
    """Fine-tuning without a source."""
    model: Any = torch.compile(setting.target) if compiled else setting.target

    def forward(images: Tensor, coins: Sequence[bool]) -> Tensor:
        return model(images)

    return forward


def as_published(setting: Setting) -> Forward:
    """The authors' computation."""
    return partial(published.forward, setting.target, setting.source)


def by_hand(setting: Setting, compiled: bool = False) -> Forward:
    """On timm's blocks and torch's SDPA."""
    return ByHand(setting.target, setting.source, compiled)


def ours(setting: Setting, compiled: bool = False, class_rows: bool = True) -> StochCA:
    """StochCA, to whose forward coins are given.

    Args:
        setting: Has the target and the source.
        compiled: Compile the step of a block.
        class_rows: Leave out tokens that nothing reads.
    """
    model = StochCA(setting.target, setting.source, class_rows=class_rows).train()
    if compiled:
        model.compile()
    return model


# Ours, one saving switched off in each.
SWITCHED_OFF = (
    Provider("ours, all rows", partial(ours, class_rows=False), savings=Savings(class_rows=False)),
)

PROVIDERS = {
    provider.name: provider
    for provider in (
        Provider(PLAIN, plain, savings=None),
        Provider(PUBLISHED, as_published, savings=BY_HAND, precision=torch.float32),
        Provider(PUBLISHED_AUTOCAST, as_published, savings=BY_HAND),
        Provider(BY_HAND_EAGER, by_hand, savings=BY_HAND),
        Provider(OURS, ours),
        Provider(PLAIN_COMPILED, partial(plain, compiled=True), savings=None, compiled=True),
        Provider(BY_HAND_COMPILED, partial(by_hand, compiled=True), savings=BY_HAND, compiled=True),
        Provider(OURS_COMPILED, partial(ours, compiled=True), compiled=True),
        *SWITCHED_OFF,
    )
}
