"""A workload set up on a device, and everybody who has been built on it: built once for all its cases."""

import contextlib
import functools
import gc
import time
from dataclasses import dataclass, field

import torch

from bench.step.check import Wrong
from bench.step.memory import allocated
from bench.step.provider import Provider
from bench.step.providers import BY_HAND_EAGER, PLAIN, PROVIDERS
from bench.step.reference import Outcome, Reference
from bench.step.training import TrainingStep, make_optimizer
from bench.step.workloads import Setting, Workload


@dataclass
class Ready:
    """A provider that has run once.

    Args:
        step: Its step.
        seconds: What building it and its first step took; if it is compiled, the first under every draw.
        prepared_bytes: Memory on the device that it took then and keeps.
        compiled: Whether a draw may need graphs that others did not.
        seen: Coins that it has run under.
    """

    step: TrainingStep
    seconds: float
    prepared_bytes: int
    compiled: bool
    seen: set[tuple[bool, ...]] = field(default_factory=set)

    def outcome(self, coins: tuple[bool, ...]) -> Outcome:
        """What its step computes; what is compiled for it is part of the setup."""
        start = time.perf_counter()
        outcome = self.step.outcome(coins)
        if self.compiled and coins not in self.seen:
            self.seconds += time.perf_counter() - start
        self.seen.add(coins)
        return outcome


class Stage:
    """Models, data, optimizer and built providers of one workload.

    Args:
        workload: What is trained.
        device: Where.
    """

    def __init__(self, workload: Workload, device: torch.device) -> None:
        self.setting = Setting.make(workload, device)
        self.optimizer = make_optimizer(self.setting)
        self.broken_by: str | None = None  # who has left the device unusable
        self._weights = [p.detach().clone() for p in self.setting.target.parameters()]
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
            seconds = time.perf_counter() - start
            coins = provider.coins(self._alternating)
            self._ready[key] = Ready(step, seconds, prepared, provider.compiled, {coins})
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

    def require_weights(self) -> None:
        """Make sure that steps have left the weights that all share, bit for bit.

        Raises:
            Wrong: They have changed.
        """
        if self._has_changed():
            raise Wrong("its step changes the weights at a learning rate of 0: a gradient is not finite")

    def clean(self) -> None:
        """After a failure: free gradients and what has lost its owner, and undo what happened to weights."""
        self.optimizer.zero_grad(set_to_none=True)
        free_memory()
        with contextlib.suppress(RuntimeError):  # as in `free_memory`
            if self._has_changed():
                self._restore()

    def _has_changed(self) -> bool:
        return not all(map(torch.equal, self._weights, self.setting.target.parameters()))

    @torch.no_grad()
    def _restore(self) -> None:
        """Weights as they were and moments of zero, in place: what is compiled or captured stays valid."""
        for parameter, weights in zip(self.setting.target.parameters(), self._weights, strict=True):
            parameter.copy_(weights)
            for name in ("exp_avg", "exp_avg_sq"):
                self.optimizer.state[parameter][name].zero_()


def is_broken(device: torch.device) -> bool:
    """Whether nothing works on a device any more, as after an illegal access to its memory."""
    if device.type != "cuda":
        return False
    try:
        torch.cuda.synchronize()
    except RuntimeError:
        return True
    return False


def free_memory() -> None:
    """Collect garbage, and give back what no tensor takes."""
    gc.collect()
    if torch.cuda.is_initialized():
        # A broken device fails again with whatever comes next, which is recorded there.
        with contextlib.suppress(RuntimeError):
            torch.cuda.empty_cache()
