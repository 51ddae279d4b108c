"""One case: check every provider, time those who pass, and compare them."""

import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import torch

from bench.kernels.attend import SDPA, Unsupported, eager
from bench.kernels.check import Check, Wrong
from bench.kernels.clock import Work, num_sets, peak_bytes, percentiles, prepare, time_rounds
from bench.kernels.floors import Ceilings, pass_bytes, pass_flops
from bench.kernels.inputs import Draw
from bench.kernels.paths import PATHS, Pass, Path
from bench.kernels.providers import OURS, Provider, Results, bind
from bench.kernels.shapes import TINY, Shape

# How torch says that the chosen backend of its SDPA does not take these inputs.
_NO_BACKEND = ("No available kernel", "No viable backend")

Entry = dict[str, Any]
"""What is recorded of one provider."""


@dataclass(frozen=True)
class Case:
    """One pass of one path at one shape."""

    path: Path
    which: Pass
    shape: Shape

    @property
    def name(self) -> str:
        """As in `self forward B128-N197-H12-D64`."""
        return f"{self.path.name} {self.which} {self.shape.name}"


@dataclass(frozen=True)
class Settings:
    """How cases are measured.

    Args:
        device: Where.
        dtype: Of all inputs.
        rounds: Samples of each provider.
        ceilings: What the device reaches.
    """

    device: torch.device
    dtype: torch.dtype
    rounds: int
    ceilings: Ceilings


def all_cases(device: torch.device) -> list[Case]:
    """Every pass of every path at every shape; on the CPU at a tiny one alone."""
    return [
        Case(path, which, shape)
        for path in PATHS
        for shape in (path.shapes if device.type == "cuda" else (TINY,))
        for which in path.passes
    ]


def measure(case: Case, competitors: Sequence[Provider], settings: Settings) -> dict[str, Any]:
    """Everything that is recorded of a case: what was measured, or the reason why nothing was."""
    start = time.perf_counter()
    try:
        found = _measure(case, competitors, settings)
    except Exception as error:  # the definition itself fails, or does not fit: the other cases go on
        found = _reason(error)
    return {
        "name": case.name,
        "path": case.path.name,
        "pass": case.which,
        "shape": {**asdict(case.shape), "name": case.shape.name},
        **found,
        "seconds": round(time.perf_counter() - start, 2),
    }


def _measure(case: Case, competitors: Sequence[Provider], settings: Settings) -> dict[str, Any]:
    path, which, device = case.path, case.which, settings.device

    def draw(seed: int) -> dict[str, torch.Tensor]:
        return path.draw(Draw(case.shape, settings.dtype, device, seed))

    first = draw(0)
    definition = bind(path.rival_with(eager), first, path.leaves, which)()
    check = Check(path, case.shape, which, first, definition)
    num_bytes, flops = pass_bytes(path, first, definition, which), pass_flops(path, case.shape, which)
    floors = {
        "bytes": 1e6 * num_bytes / settings.ceilings.copy_bytes_per_s,
        "flops": 1e6 * flops / settings.ceilings.matmul_flops_per_s,
    }
    sets = [first, *map(draw, range(1, num_sets(num_bytes, max(floors.values()), device)))]

    entries: dict[str, Entry] = {}
    admitted: dict[str, Work] = {}
    for provider in competitors:
        calls = [partial(bind, provider.run, tensors, path.leaves, which) for tensors in sets]
        entries[provider.name], work = _admit(calls, partial(check, allowed=provider.factor), device)
        if work is not None:
            admitted[provider.name] = work
    for name, samples in time_rounds(admitted, settings.rounds, device).items():
        times = percentiles([sample / len(sets) for sample in samples])
        shares = {f"{kind}_fraction": floor / times["p50_us"] for kind, floor in floors.items()}
        entries[name].update(status="timed", **times, **shares)
    return {
        "input_sets": len(sets),
        "checked_samples": len(check.samples),
        **{f"{kind}_floor_us": floor for kind, floor in floors.items()},
        "providers": entries,
        **compare(entries),
    }


def compare(entries: Mapping[str, Entry]) -> dict[str, Any]:
    """The fastest rival, the fastest backend of SDPA, and the former's median time over ours."""
    times = {name: entry["p50_us"] for name, entry in entries.items() if entry["status"] == "timed"}
    ours = times.pop(OURS, None)
    best = min(times, key=times.__getitem__, default=None)
    return {
        "best_rival": best,
        "best_sdpa": min(times.keys() & SDPA.keys(), key=times.__getitem__, default=None),
        "ratio": times[best] / ours if best is not None and ours is not None else None,
    }


def _admit(
    binds: Sequence[Callable[[], Callable[[], Results]]],
    check: Callable[[Results], float],
    device: torch.device,
) -> tuple[Entry, Work | None]:
    """Check one provider and prepare what is timed of it, or say why it is not."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            calls = [make() for make in binds]
            factor = check(calls[0]())
            peak = peak_bytes(calls[0], device)
            work = prepare(calls, device)
            factor = max(factor, check(work.run()))
        except Unsupported as error:
            return _refused("unsupported", str(error)), None
        except Wrong as error:
            return _refused("wrong", str(error)), None
        except Exception as error:  # whatever a provider raises is a result like any other
            if str(error).startswith(_NO_BACKEND):
                reasons = dict.fromkeys(str(w.message).split(" (Triggered")[0] for w in caught)
                return _refused("unsupported", " ".join([str(error), *reasons])), None
            return {"status": "failed", **_reason(error)}, None
    return {"status": "checked", "error_factor": factor, "method": work.method, "peak_bytes": peak}, work


def _refused(status: str, reason: str) -> Entry:
    return {"status": status, "reason": reason}


def _reason(error: Exception) -> dict[str, str]:
    return {"reason": f"{type(error).__name__}: {error}"[:1000]}
