"""Memory of a step: at its peak on the device, and what its forward keeps for the backward."""

import gc
from collections.abc import Iterable, Sequence
from functools import partial
from statistics import fmean
from typing import Any

import torch
from torch import Tensor, nn

from bench.counts import saved_bytes
from bench.step.provider import Provider
from bench.step.training import TrainingStep

MIB = 2**20
Coins = tuple[bool, ...]


def allocated(device: torch.device) -> int | None:
    """Bytes that tensors take on a GPU, garbage collected first; None on the CPU."""
    if device.type != "cuda":
        return None
    gc.collect()
    torch.cuda.synchronize()
    return torch.cuda.memory_allocated()


def peak(
    provider: Provider, step: TrainingStep, draws: Sequence[Coins], prepared: int
) -> dict[str, float | None]:
    """What a provider takes on a GPU if it runs alone, at the most over the draws; None if that is not known.

    Args:
        provider: Says whether the source must be there at all.
        step: Its step, which has run before.
        draws: Coins of all blocks, several times over.
        prepared: Bytes that the provider made and keeps, such as weights of the source in another dtype.
    """
    setting = step.setting
    if setting.device.type != "cuda" or provider.graphed:
        return {"peak_mib": None, "peak_mib_mean": None, "peak_mib_without_frozen": None}
    steps = [_step_peak(step, coins) for coins in draws]
    trained = _bytes(_tensors(setting.target)) + _bytes(_state(step.optimizer))
    frozen = _bytes(_tensors(setting.source)) + prepared if provider.reads_source else 0
    return {
        "peak_mib": (max(steps) + trained + frozen) / MIB,
        "peak_mib_mean": (fmean(steps) + trained + frozen) / MIB,
        "peak_mib_without_frozen": (max(steps) + trained) / MIB,
    }


def saved(step: TrainingStep, draws: Sequence[Coins]) -> float:
    """MiB that a forward keeps for the backward besides parameters, the mean over the draws."""
    parameters = [*_tensors(step.setting.target), *_tensors(step.setting.source)]
    by_draw = {coins: saved_bytes(partial(step.logits, coins), parameters) for coins in set(draws)}
    return fmean(by_draw[coins] for coins in draws) / MIB


def _step_peak(step: TrainingStep, coins: Coins) -> int:
    """Bytes at the peak of a step over those before it."""
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    step.forward_backward(coins)
    step.update()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


def _tensors(model: nn.Module) -> list[Tensor]:
    return [*model.parameters(), *model.buffers()]


def _state(optimizer: torch.optim.Optimizer) -> list[Tensor]:
    values: Iterable[Any] = (value for state in optimizer.state.values() for value in state.values())
    return [value for value in values if isinstance(value, Tensor)]


def _bytes(tensors: Iterable[Tensor]) -> int:
    return sum(tensor.nbytes for tensor in tensors)
