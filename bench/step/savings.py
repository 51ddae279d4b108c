"""StochCA with one of its savings switched off: what each is worth.

Every variant computes the same step. Where the package has no switch, the place where a saving is made is
patched for the time of the forward.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import replace
from typing import Any
from unittest import mock

import torch
from torch import Tensor

import stochca.attention
from bench.step.workloads import Setting
from stochca import StepPlan, StochCA
from stochca.block import source_step
from stochca.qkv import Rope
from stochca.vit import Stem, num_class_rows
from stochca_kernels.projection import Projection, pair_of


class Patched:
    """A forward of StochCA within a context of its own.

    Args:
        model: In training.
        patch: Makes the context.
    """

    def __init__(
        self, model: StochCA, patch: Callable[[], AbstractContextManager[Any]] = nullcontext
    ) -> None:
        self.model, self.patch = model, patch

    def __call__(self, images: Tensor, coins: Sequence[bool]) -> Tensor:
        """Logits `[B, classes]`."""
        with self.patch():
            return self.model(images, coins=coins)


def all_rows(setting: Setting) -> Patched:
    """Tokens that nothing reads are computed."""
    return Patched(StochCA(setting.target, setting.source, class_rows=False).train())


def full_source(setting: Setting) -> Patched:
    """The source runs to its end, whatever the coins."""

    class FullSource(StochCA):
        def _plan(self, *args: Any) -> StepPlan:
            return replace(super()._plan(*args), whole_source=True)

    return Patched(FullSource(setting.target, setting.source).train())


def source_first(setting: Setting) -> Patched:
    """The source runs as far as it is needed before the target starts: pairs of all blocks exist at once."""
    return Patched(SourceFirst(setting.target, setting.source).train())


def own_pairs(setting: Setting) -> Patched:
    """Blocks that read the source project keys and values of their own nevertheless, and drop them."""

    def query_of_three(attn: Any, x: Tensor, rope: Rope) -> Tensor:
        packed = attn.qkv(x).unflatten(-1, (3, attn.num_heads, attn.head_dim))
        return attn.q_norm(packed[:, :, 0].transpose(1, 2))

    def cross_attention(attn: Any, x: Tensor, source_kv: Any, coin: Any, **options: Any) -> Tensor:
        is_cross = coin is True
        with mock.patch("stochca.attention.query", query_of_three) if is_cross else nullcontext():
            return stochca.attention.cross_attention(attn, x, source_kv, coin, **options)

    return Patched(_model(setting), lambda: mock.patch("stochca.block.cross_attention", cross_attention))


def all_gradients(setting: Setting) -> Patched:
    """The backward of cross-attention computes gradients of the source's keys and values, and drops them."""
    attend = stochca.attention._attend

    def as_own(attn: Any, q: Tensor, own: Any, source: Any, coin: Any, impl: Any) -> Tensor:
        if coin is not True or isinstance(source, Projection):
            return attend(attn, q, own, source, coin, impl)
        pair = tuple(t.detach().requires_grad_() for t in source)
        return attend(attn, q, pair, None, False, impl)

    return Patched(_model(setting), lambda: mock.patch("stochca.attention._attend", as_own))


def pairs_for_rows(setting: Setting) -> Patched:
    """Keys and values are projected for class rows as well."""
    key_value = stochca.attention.key_value

    def pair(attn: Any, x: Tensor, rope: Rope) -> Any:
        return pair_of(key_value(attn, x, rope), attn.num_heads)

    @contextmanager
    def patch() -> Iterator[None]:
        with mock.patch("stochca.attention.key_value", pair), mock.patch("stochca.block.key_value", pair):
            yield

    return Patched(_model(setting), patch)


def unpacked(setting: Setting) -> Patched:
    """Gradients of queries, keys and values are three tensors, copied together for the projection."""
    never = mock.Mock(return_value=False)
    return Patched(_model(setting), lambda: mock.patch("stochca.attention.is_linear", never))


class SourceFirst(StochCA):
    """StochCA whose source has run as far as it is needed when its target starts."""

    def _source_stem(self, images: Tensor) -> Stem:
        assert self.plan is not None
        return self.hand_over(self.run_source(images, self.plan))

    @torch.no_grad()
    def run_source(self, images: Tensor, plan: StepPlan) -> list[tuple[Any, ...]]:
        """What the source hands over to each block of the target, and its tokens last."""
        first_row = plan.first_class_row_block
        has_rows = self.class_rows and num_class_rows(self.target) is not None
        (x, ropes), results = super()._source_stem(images), []
        for i, block in enumerate(self.source.blocks[: plan.source_blocks]):
            need_kv, advance = plan.coins[i] is not False, i + 1 < plan.source_blocks
            few = has_rows and i >= first_row
            results.append(source_step(block, x, need_kv, advance, few, ropes[i], self.impl))
            x = results[-1][-1]
        return results

    def hand_over(self, results: list[tuple[Any, ...]]) -> Stem:
        """Let the lockstep find what was computed before, block by block."""
        remaining = iter(results)
        self._source_step = lambda *_: next(remaining)
        return Stem(results[-1][-1], [None] * len(self.source.blocks))


def _model(setting: Setting) -> StochCA:
    return StochCA(setting.target, setting.source).train()
