"""A workload set up on a device, and everybody who has been built on it: built once for all its cases."""

import contextlib
import functools
import gc
import time
from typing import NamedTuple

import torch

from bench.step.memory import allocated
from bench.step.provider import Provider
from bench.step.providers import BY_HAND_EAGER, PLAIN, PROVIDERS
from bench.step.reference import Outcome, Reference
from bench.step.training import TrainingStep, make_optimizer
from bench.step.workloads import Setting, Workload


class Ready(NamedTuple):
    """A provider that has run once.

    Args:
        step: Its step.
        seconds: What building it and its first step took, compilation included.
        prepared_bytes: Memory on the device that it took then and keeps.
    """

    step: TrainingStep
    seconds: float
    prepared_bytes: int


class Stage:
    """Models, data, optimizer and built providers of one workload.

    Args:
        workload: What is trained.
        device: Where.
    """

    def __init__(self, workload: Workload, device: torch.device) -> None:
        self.setting = Setting.make(workload, device)
        self.optimizer = make_optimizer(self.setting)
        self._alternating = tuple(i % 2 == 1 for i in range(len(self.setting.target.blocks)))
        self._ready: dict[tuple[str, torch.dtype], Ready] = {}
        self._held: dict[torch.dtype, Setting] = {}
        self._warm: set[torch.dtype] = set()

    @functools.cached_property
    def reference(self) -> Reference:
        """The definition."""
        return Reference(self.setting)

    def eager_outcome(self, precision: torch.dtype, coins: tuple[bool, ...]) -> Outcome:
        """What the eager rival that is written by hand computes."""
        return self.ready(PROVIDERS[BY_HAND_EAGER], precision).step.outcome(coins)

    def ready(self, provider: Provider, precision: torch.dtype) -> Ready:
        """A provider that has been built, and has run once."""
        key = provider.name, precision
        if key not in self._ready:
            # What libraries allocate with the first step of all is no provider's.
            self._warm_up(precision)
            setting = self._setting_of(provider, precision)
            before, start = allocated(self.setting.device), time.perf_counter()
            step = provider.step(provider.build(setting), setting, self.optimizer, precision)
            step.outcome(provider.coins(self._alternating))
            after = allocated(self.setting.device)
            prepared = 0 if before is None or after is None else max(0, after - before)
            self._ready[key] = Ready(step, time.perf_counter() - start, prepared)
        return self._ready[key]

    def _setting_of(self, provider: Provider, precision: torch.dtype) -> Setting:
        """The setting as a provider wants it: all that hold the source in one dtype share its weights."""
        if not (provider.reads_source and provider.holds_source):
            return self.setting
        if precision not in self._held:
            self._held[precision] = self.setting.with_source_in(precision)
        return self._held[precision]

    def _warm_up(self, precision: torch.dtype) -> None:
        if precision in self._warm:
            return
        self._warm.add(precision)
        plain = PROVIDERS[PLAIN].build(self.setting)
        TrainingStep(plain, self.setting, self.optimizer, precision).outcome(self._alternating)

    def clean(self) -> None:
        """After a failure: free gradients, and what else has lost its owner."""
        self.optimizer.zero_grad(set_to_none=True)
        free_memory()


def free_memory() -> None:
    """Collect garbage, and give back what no tensor takes."""
    gc.collect()
    if torch.cuda.is_initialized():
        # A broken device fails again with whatever comes next, which is recorded there.
        with contextlib.suppress(RuntimeError):
            torch.cuda.empty_cache()
