"""StochCA, and everybody that it is compared with.

A new one is a function from a `Setting` to a forward `(images, coins) -> logits`, and a line in `PROVIDERS`.
"""

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from bench.cost import BY_HAND, Savings
from bench.step import experiments, published, savings
from bench.step.by_hand import ByHand
from bench.step.provider import Provider
from bench.step.training import Forward, TF32Step
from bench.step.workloads import Setting
from stochca import StochCA

OURS, OURS_RECOMPUTING, OURS_COMPILED = "ours", "ours, recomputing", "ours compiled"
PLAIN, PLAIN_COMPILED = "plain", "plain compiled"
BY_HAND_EAGER, BY_HAND_COMPILED = "by hand", "by hand compiled"
# Who writes it by hand leaves out what the coins leave out in a block.
HAND_SAVINGS = Savings(class_rows=False, full_source=True)
# A source in float8 is near, not equal.
FLOAT8 = {"logits": 10.0, "gradients": 10.0}
PUBLISHED, PUBLISHED_AUTOCAST = "as published", "as published, autocast"
PUBLISHED_TF32 = "as published, TF32"


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


def ours(setting: Setting, compiled: bool = False) -> Forward:
    """StochCA."""
    model = StochCA(setting.target, setting.source).train()
    if compiled:
        model.compile()
    return lambda images, coins: model(images, coins=coins)


# Ours, one saving switched off in each.
SWITCHED_OFF = (
    Provider("ours, all rows", savings.all_rows, Savings(class_rows=False)),
    Provider("ours, full source", savings.full_source, Savings(full_source=True)),
    Provider("ours, source first", savings.source_first),
    Provider("ours, own K, V", savings.own_pairs, Savings(own_kv=True)),
    Provider("ours, K, V of class rows", savings.pairs_for_rows, Savings(row_kv=True)),
    Provider("ours, all gradients", savings.all_gradients),
    Provider("ours, unpacked gradients", savings.unpacked),
    Provider("ours, source cast in every step", ours, holds_source=False),
)

# Other ways to run ours, on a GPU.
EXPERIMENTS = (
    Provider("ours, one launch", experiments.one_launch),
    Provider("ours, fused projection", partial(experiments.one_launch, fused=True)),
    Provider("ours, side stream", experiments.side_stream),
    Provider("ours, prefetched source", experiments.prefetched),
    Provider("ours, graphs of blocks", experiments.cuda_graphs_of_blocks, compiled=True, graphed=True),
    Provider(
        "ours, graph of the step",
        experiments.coins_on_device,
        BY_HAND,
        step=experiments.GraphedStep,
        graphed=True,
    ),
    Provider("ours, source in float8", experiments.float8_source, allowed=FLOAT8),
)

PROVIDERS = {
    provider.name: provider
    for provider in (
        Provider(PLAIN, plain, savings=None),
        Provider(PUBLISHED, as_published, savings=BY_HAND, precision=torch.float32),
        Provider(
            PUBLISHED_TF32,
            as_published,
            savings=BY_HAND,
            precision=torch.float32,
            step=TF32Step,
            tf32=True,
        ),
        Provider(PUBLISHED_AUTOCAST, as_published, savings=BY_HAND, holds_source=False),
        Provider(BY_HAND_EAGER, by_hand, savings=HAND_SAVINGS),
        Provider(OURS, ours),
        Provider(OURS_RECOMPUTING, experiments.recomputing),
        Provider(PLAIN_COMPILED, partial(plain, compiled=True), savings=None, compiled=True),
        Provider(BY_HAND_COMPILED, partial(by_hand, compiled=True), savings=HAND_SAVINGS, compiled=True),
        Provider(OURS_COMPILED, partial(ours, compiled=True), compiled=True),
        *SWITCHED_OFF,
        *EXPERIMENTS,
    )
}
