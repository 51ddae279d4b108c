"""Timing: several providers take turns, and each round of each is one sample.

On a GPU a provider's calls, one for each set of inputs, are captured in one CUDA graph. Enough sets are used
that a call finds nothing of its inputs in the L2 cache, and launching the graph costs each call little.
"""

import math
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from bench.kernels.providers import Results

WARM_UP_ROUNDS = 3
MAX_SETS = 8
# Launching a graph takes some microseconds, which its calls share.
SAMPLE_US = 200
# Before each sample the GPU waits for about half a millisecond, in which its work is queued.
_QUEUE_CYCLES = 1_000_000


@dataclass(frozen=True)
class Work:
    """What is timed.

    Args:
        run: Does it, and returns the results on the first set of inputs.
        method: How it is launched.
    """

    run: Callable[[], Any]
    method: str


def num_sets(num_bytes: int, floor_us: float, device: torch.device) -> int:
    """How many sets of inputs: all calls together touch twice the L2 cache, and last long enough to be timed.

    Args:
        num_bytes: What a call reads and writes.
        floor_us: The least time that it can take.
        device: Where. On the CPU there is one set.
    """
    if device.type != "cuda":
        return 1
    cache = torch.cuda.get_device_properties(device).L2_cache_size
    return min(MAX_SETS, max(math.ceil(2 * cache / num_bytes), math.ceil(SAMPLE_US / floor_us)))


def prepare(calls: Sequence[Callable[[], Results]], device: torch.device) -> Work:
    """Make one piece of work of all calls, a CUDA graph where they can be captured."""

    def run() -> Results:
        results = [call() for call in calls]
        return results[0]

    if device.type != "cuda":
        return Work(run, "one call after the other")
    run()
    try:
        return _captured(run)
    except RuntimeError as error:
        torch.cuda.synchronize()
        return Work(run, f"launched one by one, since capture failed: {error}")


def _captured(run: Callable[[], Results]) -> Work:
    graph = torch.cuda.CUDAGraph()
    # The stream on which a forward ran is the one on which its backward will.
    with torch.cuda.graph(graph, stream=torch.cuda.current_stream()):
        results = run()
    for tensor in results.values():
        tensor.fill_(float("nan"))  # for the check to find what a replay does not write

    def replay(alive: Callable[[], Results] = run) -> Results:
        # What the calls read lives as long as the graph: a backward reads results of a forward outside it.
        graph.replay()
        return results

    return Work(replay, "CUDA graph")


def time_rounds(work: Mapping[str, Work], rounds: int, device: torch.device) -> dict[str, list[float]]:
    """Microseconds of every run of each piece of work; they take turns, and who is first changes."""
    time_once = _cuda_sample if device.type == "cuda" else _host_sample
    samples: dict[str, list[Callable[[], float]]] = {name: [] for name in work}
    turns = deque(work)
    for i in range(WARM_UP_ROUNDS + rounds):
        for name in turns:
            sample = time_once(work[name].run)
            if i >= WARM_UP_ROUNDS:
                samples[name].append(sample)
        turns.rotate(-1)
    if device.type == "cuda":
        torch.cuda.synchronize()
    return {name: [sample() for sample in taken] for name, taken in samples.items()}


def _cuda_sample(run: Callable[[], Any]) -> Callable[[], float]:
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda._sleep(_QUEUE_CYCLES)
    start.record()
    run()
    end.record()
    return lambda: 1e3 * start.elapsed_time(end)


def _host_sample(run: Callable[[], Any]) -> Callable[[], float]:
    start = time.perf_counter()
    run()
    elapsed = time.perf_counter() - start
    return lambda: 1e6 * elapsed


def percentiles(samples: Sequence[float]) -> dict[str, float]:
    """Median and spread."""
    values = torch.tensor(samples, dtype=torch.float64)
    return {f"p{percent}_us": values.quantile(percent / 100).item() for percent in (20, 50, 80)}


def peak_bytes(call: Callable[[], Results], device: torch.device) -> int | None:
    """Memory that a call takes at its peak, results included, over what is taken before; None on the CPU."""
    if device.type != "cuda":
        return None
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    call()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before
