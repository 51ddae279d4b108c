"""One case: check every provider, time those who pass, and compare them."""

import time
from collections.abc import Mapping
from dataclasses import dataclass
from statistics import fmean
from typing import Any

import torch

from bench.cost import Size, plain_flops, representative_draws, step_flops
from bench.step import memory
from bench.step.breakdown import breakdown
from bench.step.cases import Case
from bench.step.check import Check, Wrong, draws_to_check, require_finite
from bench.step.clock import Coins, Deadline, time_rounds
from bench.step.provider import Provider
from bench.step.providers import OURS, OURS_COMPILED, PROVIDERS
from bench.step.stage import Stage, is_broken
from bench.step.training import TrainingStep

# Compilation is begun where so much time is left.
COMPILE_SECONDS = 60.0

Entry = dict[str, Any]
"""What is recorded of one provider."""


@dataclass(frozen=True)
class Settings:
    """How cases are measured.

    Args:
        num_draws: Draws of the coins that stand for all.
        rounds: How often every provider runs each of them, where time is left.
        deadline: When providers that have not begun are left out.
        matmul_flops_per_s: What the device reaches in each precision.
    """

    num_draws: int
    rounds: int
    deadline: Deadline
    matmul_flops_per_s: Mapping[torch.dtype, float]


def measure(case: Case, stage: Stage, settings: Settings) -> dict[str, Any]:
    """Everything that is recorded of a case.

    Args:
        case: What is measured.
        stage: Of its workload.
        settings: How.
    """
    start = time.perf_counter()
    size = Size.of(stage.setting.target)
    draws = representative_draws(size, case.p, settings.num_draws)
    entries: dict[str, Entry] = {name: _refused("not reached", "no time was left") for name in case.providers}
    admitted: dict[str, TrainingStep] = {}
    check = Check(stage.reference, stage.eager_outcome)
    for name in case.providers:
        if stage.broken_by is None and not settings.deadline.passed(
            COMPILE_SECONDS if PROVIDERS[name].compiled else 0.0
        ):
            _admit(PROVIDERS[name], case, stage, check, draws, entries, admitted)
    del check

    def failed(name: str, error: Exception) -> bool:
        entries[name] = _failure(error)
        _after_failure(name, stage)
        return stage.broken_by is not None

    timed = draws * (settings.num_draws // len(draws))
    device = stage.setting.device
    if stage.broken_by is not None:
        admitted = {}
    times = time_rounds(
        admitted, timed, settings.rounds, device, settings.deadline, failed, stage.require_weights
    )
    if stage.broken_by is not None:
        for name in entries.keys() - times.keys() - {stage.broken_by}:
            if entries[name]["status"] in ("checked", "not reached"):
                entries[name] = _refused("not reached", broken_reason(stage.broken_by))
    for name, taken in times.items():
        entries[name].update(status="timed", **taken.summary(draws, case.workload.batch))
        precision = PROVIDERS[name].precision_in(case.dtype)
        flops = case.workload.batch * provider_flops(PROVIDERS[name], size, draws)
        rate = 1e3 * flops / entries[name]["mean_ms"]
        reached = None if PROVIDERS[name].tf32 else settings.matmul_flops_per_s[precision]
        entries[name].update(flops=flops, mfu=None if reached is None else rate / reached)
    for name in times if case.study == "main" else ():
        if stage.broken_by is None and not settings.deadline.passed():
            entries[name].update(_breakdown(name, admitted[name], median_draw(size, draws), stage))
    return {
        **case.record(),
        "workload": case.workload.record(stage.setting.image_size),
        "draws": draws,
        "providers": entries,
        "ratios": ratios(entries),
        "seconds": round(time.perf_counter() - start, 2),
    }


def median_draw(size: Size, draws: list[Coins]) -> Coins:
    """The draw whose step has the median of FLOPs."""
    return sorted(draws, key=lambda coins: step_flops(size, coins))[len(draws) // 2]


def broken_reason(name: str) -> str:
    """Why nobody is measured after a provider has left the device unusable."""
    return f"the device is unusable since {name!r} ran: `--without '^{name}$'` leaves it out"


def not_measured(case: Case, status: str, reason: str) -> dict[str, Any]:
    """What is recorded of a case of which no provider was measured."""
    entries = {name: _refused(status, reason) for name in case.providers}
    workload = case.workload.record()
    return {
        **case.record(),
        "workload": workload,
        "draws": [],
        "providers": entries,
        "ratios": {},
        "seconds": 0.0,
    }


def ratios(entries: Mapping[str, Entry]) -> dict[str, float]:
    """Our expected time over that of each other; a compiled one is compared with ours compiled."""
    times = {name: entry["mean_ms"] for name, entry in entries.items() if entry["status"] == "timed"}
    found = {}
    for name, ms in times.items():
        counterpart = OURS_COMPILED if PROVIDERS[name].compiled else OURS
        if counterpart in times and name != counterpart:
            found[name] = times[counterpart] / ms
    return found


def provider_flops(provider: Provider, size: Size, draws: list[Coins]) -> float:
    """FLOPs that a step of a provider has to do for one image, the mean over the draws."""
    if provider.savings is None:
        return plain_flops(size)
    return fmean(step_flops(size, coins, **vars(provider.savings)) for coins in draws)


def _admit(
    provider: Provider,
    case: Case,
    stage: Stage,
    check: Check,
    draws: list[Coins],
    entries: dict[str, Entry],
    admitted: dict[str, TrainingStep],
) -> None:
    """Check one provider, warm it up and measure its memory, or say why it is not timed."""
    precision = provider.precision_in(case.dtype)
    unit = torch.float16 if provider.tf32 else precision  # TF32 rounds to as many bits
    try:
        ready = stage.ready(provider, precision)
        seen = list(dict.fromkeys(map(provider.coins, draws)))
        # Every draw, also for the graphs that it needs: they are made before memory is measured.
        errors = []
        for coins in seen:
            outcome = ready.outcome(coins)
            require_finite(outcome, coins)
            if coins in draws_to_check(seen):
                errors.append(check(outcome, unit, coins, provider.allowed))
            del outcome
        memory_of_step = memory.peak(provider, ready.step, draws, ready.prepared_bytes)
        stage.require_weights()
        entries[provider.name] = {
            "status": "checked",
            "precision": str(precision).removeprefix("torch."),
            "error": {name: max(error[name] for error in errors) for name in errors[0]},
            "setup_s": round(ready.seconds, 2),
            **memory_of_step,
            "saved_mib": memory.saved(ready.step, draws) if provider.is_eager else None,
        }
        admitted[provider.name] = ready.step
    except Exception as error:  # whatever a provider raises is a result like any other
        entries[provider.name] = _failure(error)
    if provider.name not in admitted:  # apart from the error, which holds tensors
        _after_failure(provider.name, stage)


def _after_failure(name: str, stage: Stage) -> None:
    stage.clean()
    if stage.broken_by is None and is_broken(stage.setting.device):
        stage.broken_by = name


def _breakdown(name: str, step: TrainingStep, coins: Coins, stage: Stage) -> dict[str, Any]:
    try:
        found = breakdown(step, coins)
        stage.require_weights()
        return found
    except Exception as error:  # a profiler that fails takes no time away
        found = {"breakdown_reason": _reason(error)}
    _after_failure(name, stage)
    return found


def _failure(error: Exception) -> Entry:
    if isinstance(error, Wrong):
        return _refused("wrong", str(error))
    if isinstance(error, torch.OutOfMemoryError):
        return _refused("out of memory", _reason(error))
    return _refused("unsupported" if isinstance(error, ImportError) else "failed", _reason(error))


def _refused(status: str, reason: str) -> Entry:
    return {"status": status, "reason": reason}


def _reason(error: Exception) -> str:
    return f"{type(error).__name__}: {error}"[:1000]
