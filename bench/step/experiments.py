"""Other ways to run StochCA's step, each of which computes the same: what wins moves into the package.

`bench/LOG.md` says what was tried, and what came of it.
"""

import copy
import gc
import os
from collections.abc import Sequence
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch.nn import functional as F

from bench.step.savings import Patched, SourceFirst
from bench.step.training import Forward, TrainingStep
from bench.step.workloads import Setting
from stochca import StepPlan, StochCA
from stochca.attention import Coin, merge_heads
from stochca.block import normalized, residuals, source_step
from stochca.model import Lockstep
from stochca.qkv import key_value, query
from stochca.vit import Stem
from stochca_kernels import Projection, stochca_attention
from stochca_kernels.projection import pair_of


def recomputing(setting: Setting) -> Patched:
    """Norms, activations and the source's pairs are computed again in the backward."""
    return Patched(StochCA(setting.target, setting.source, recompute=True).train())


def float8_source(setting: Setting) -> Patched:
    """Most products of the source in float8. Not exact."""
    source = copy.deepcopy(setting.source)
    return Patched(StochCA(setting.target, source, source_dtype="float8").train())


def cuda_graphs_of_blocks(setting: Setting) -> Forward:
    """Each compiled case of a block as CUDA graphs."""
    model = StochCA(setting.target, setting.source).train()
    model.compile(mode="reduce-overhead")

    def forward(images: Tensor, coins: Sequence[bool]) -> Tensor:
        torch.compiler.cudagraph_mark_step_begin()
        return model(images, coins=coins)

    return forward


def one_launch(setting: Setting, fused: bool = False) -> Patched:
    """Target and source attend in one launch; with `fused` the source's projection is in it as well."""
    model = OneLaunch(setting.target, setting.source).train()
    model.fused = fused
    environment = {"STOCHCA_FUSED_PROJECTION": "1" if fused else "0"}
    return Patched(model, lambda: mock.patch.dict(os.environ, environment))


def side_stream(setting: Setting) -> Patched:
    """The source runs on a stream of its own, beside the target."""
    return Patched(OnSideStream(setting.target, setting.source).train())


def prefetched(setting: Setting) -> Forward:
    """The source of the next step runs on a stream of its own, beside this step's backward."""
    return Prefetched(setting)


class OneLaunch(StochCA):
    """StochCA that serves the queries of target and source from one launch of the operator."""

    fused = False

    def _block(self, i: int, step: Lockstep, x: Tensor, x0: Tensor) -> tuple[Tensor, Tensor]:
        is_row_block = step.num_rows is not None and i >= step.plan.first_class_row_block
        if i + 1 >= step.plan.source_blocks or is_row_block:
            return super()._block(i, step, x, x0)
        block, source, coin = self.target.blocks[i], self.source.blocks[i], step.plan.coins[i] is True
        attn, frozen = block.attn, source.attn
        with torch.no_grad():
            y0 = normalized(source, x0)
            source_kv, source_q = key_value(frozen, y0), self._source_query(frozen, y0)
            source_kv = source_kv if self.fused else pair_of(source_kv, frozen.num_heads)
        y = normalized(block, x)
        own = query(attn, y) if coin else attn.qkv(y).unflatten(-1, (3, attn.num_heads, attn.head_dim))
        out, source_out = stochca_attention(
            own, None, source_kv, coin, source_q=source_q, scale=attn.scale, impl=self.impl
        )
        with torch.no_grad():
            x0 = residuals(source, x0, merge_heads(frozen, source_out, y0))
        return residuals(block, x, merge_heads(attn, out, y), step.masks[i]), x0

    def _source_query(self, frozen: Any, y0: Tensor) -> Tensor | Projection:
        if not self.fused:
            return query(frozen, y0)
        rows = slice(None, frozen.num_heads * frozen.head_dim)
        return Projection(y0, frozen.qkv.weight[rows], frozen.qkv.bias[rows])


class OnSideStream(StochCA):
    """StochCA whose source runs on a CUDA stream of its own; the target waits where it reads."""

    def _source_stem(self, images: Tensor) -> Stem:
        target_stream, stream = torch.cuda.current_stream(), torch.cuda.Stream()

        def step(block: Any, x: Tensor, need_kv: bool, *args: Any) -> Any:
            with torch.cuda.stream(stream):
                result = source_step(block, x, need_kv, *args)
            if need_kv:
                target_stream.wait_stream(stream)
                _used_on(target_stream, result)
            return result

        self._source_step = step
        stream.wait_stream(target_stream)
        with torch.cuda.stream(stream):
            return super()._source_stem(images)


class Prefetched:
    """A forward of StochCA whose source ran during the backward of the step before.

    What a step finds is what the last step of the same coins left for it: each step computes one source and
    reads one, as in training, where the next step's images and coins are known. What lies ready between steps
    is in no step's peak memory, and the last source of a turn may end after its last step.
    """

    def __init__(self, setting: Setting) -> None:
        self.model = _Handing(setting.target, setting.source).train()
        self.stream = torch.cuda.Stream(setting.device)
        self.ready: dict[tuple[Coin, ...], Any] = {}

    def __call__(self, images: Tensor, coins: Sequence[bool]) -> Tensor:
        """Logits `[B, classes]`, with the next source on its way."""
        plan = StepPlan(tuple(coins))
        if not plan.source_blocks:
            return self.model(images, coins=coins)
        self.model.handed = self.ready.pop(plan.coins, None) or self._run(images, plan)
        torch.cuda.current_stream().wait_stream(self.stream)
        _used_on(torch.cuda.current_stream(), self.model.handed)
        logits = self.model(images, coins=coins)
        self.ready[plan.coins] = self._run(images, plan)
        return logits

    def _run(self, images: Tensor, plan: StepPlan) -> list[tuple[Any, ...]]:
        self.stream.wait_stream(torch.cuda.current_stream())  # images, and no forward beside it
        with torch.cuda.stream(self.stream):
            return self.model.run_source(images, plan)


class _Handing(SourceFirst):
    handed: list[tuple[Any, ...]]

    def _source_stem(self, images: Tensor) -> Stem:
        return self.hand_over(self.handed)


class GraphedStep(TrainingStep):
    """Forward and backward as one CUDA graph, whose coins lie on the device and leave nothing out."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        setting = self.setting
        self.coins = torch.zeros(len(setting.target.blocks), 1, dtype=torch.bool, device=setting.device)
        self.parameters = list(setting.target.parameters())
        self.graph: torch.cuda.CUDAGraph | None = None

    def forward_backward(self, coins: Sequence[bool]) -> Tensor:
        """As without a graph; the first call captures it."""
        self.coins.copy_(torch.tensor(coins)[:, None].pin_memory(), non_blocking=True)
        if self.graph is None:
            self._capture()
        assert self.graph is not None
        self.graph.replay()
        for parameter, gradient in zip(self.parameters, self.gradients, strict=True):
            parameter.grad = gradient
        return self.logits_.detach()

    def _compute(self) -> tuple[Tensor, tuple[Tensor, ...]]:
        by_sample = [coin.expand(len(self.setting.images)).contiguous() for coin in self.coins]
        logits = self.logits(by_sample)
        loss = self.scaler.scale(F.cross_entropy(logits.float(), self.setting.labels))
        return logits, torch.autograd.grad(loss, self.parameters)

    def _capture(self) -> None:
        # A graph of autograd that is still alive ties parameters to the stream on which it was made.
        gc.collect()
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(3):
                self._compute()
        torch.cuda.current_stream().wait_stream(stream)
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph):
            self.logits_, self.gradients = self._compute()


def coins_on_device(setting: Setting) -> Forward:
    """StochCA with a coin for each sample, for `GraphedStep`."""
    model = StochCA(setting.target, setting.source, per="sample").train()
    return lambda images, coins: model(images, coins=coins)


def _used_on(stream: torch.cuda.Stream, results: Any) -> None:
    """Keep memory from being used again before a stream is done with it."""
    if isinstance(results, Tensor):
        results.record_stream(stream)
    elif isinstance(results, tuple | list):
        for result in results:
            _used_on(stream, result)
