"""Candidates on the GPU: compared with what the table has now, then timed, taking turns."""

from collections.abc import Sequence
from functools import partial
from typing import Any, NamedTuple

import torch

from bench.kernels.clock import Work, num_sets, percentiles, prepare, time_rounds
from bench.kernels.inputs import Draw
from bench.kernels.providers import Results
from bench.kernels.shapes import Shape
from bench.tune.candidates import Candidate
from bench.tune.groups import Group
from bench.tune.uses import USES, Tensors, Use, forced

# Root mean square of a difference, over that of the result. A key left out of 1370 makes 2.7e-2.
ALLOWED = {torch.bfloat16: 2**-7, torch.float16: 2**-10, torch.float32: 2**-9}
# Only to guess how many inputs are needed: bytes per microsecond of a fast GPU.
BYTES_PER_US = 4e6


class Settings(NamedTuple):
    """How candidates are timed: where, in which dtype, and how many samples of each."""

    device: torch.device
    dtype: torch.dtype
    rounds: int


class Timed(NamedTuple):
    """One candidate in one use: the percentiles of its time, or the reason why it has none."""

    times: dict[str, float]
    reason: str = ""


def difference(results: Results, present: Results) -> str:
    """How results differ from those of now by more than rounding, "" where they do not."""
    if results.keys() != present.keys():
        return f"wrong: {len(results)} results, not {len(present)}"
    for name, wanted in present.items():
        got = results[name]
        if (got.dtype, got.shape) != (wanted.dtype, wanted.shape):
            return f"wrong: result {name} is {got.dtype} {list(got.shape)}"
        error = (got.double() - wanted.double()).square().mean().sqrt().item()
        largest = (got.double() - wanted.double()).abs().max().item()
        size, most = wanted.double().square().mean().sqrt().item(), wanted.double().abs().max().item()
        allowed = ALLOWED[wanted.dtype]
        if not (error <= allowed * size and largest <= 4 * allowed * most):  # NaN is not
            return f"wrong: result {name} differs by {error:.2g} (rms) and {largest:.2g} (most)"
    return ""


def time_group(group: Group, tried: Sequence[Candidate], settings: Settings) -> dict[str, list[Timed]]:
    """Time all candidates of a group in every use at every shape."""
    return {
        f"{use.name} {shape.name}": _time_use(group, use, shape, tried, settings)
        for shape in group.shapes
        for use in USES[group.kernel]
        if use.timed
    }


def _time_use(
    group: Group, use: Use, shape: Shape, tried: Sequence[Candidate], settings: Settings
) -> list[Timed]:
    def draw(seed: int) -> Tensors:
        return use.draw(Draw(shape, settings.dtype, settings.device, seed))

    first = draw(0)
    present = use.bind(first, shape)()
    num_bytes = sum(t.numel() * t.element_size() for t in (*first.values(), *present.values()))
    count = num_sets(num_bytes, num_bytes / BYTES_PER_US, settings.device)
    sets = [first, *map(draw, range(1, count))]
    found = [Timed({}) for _ in tried]
    work: dict[str, Work] = {}
    for i, candidate in enumerate(tried):
        admitted = _admit(group, candidate, partial(_bind_all, use, sets, shape), present, settings.device)
        if isinstance(admitted, Work):
            work[str(i)] = admitted
        else:
            found[i] = Timed({}, admitted)
    for name, samples in time_rounds(work, settings.rounds, settings.device).items():
        found[int(name)] = Timed(percentiles([sample / count for sample in samples]))
    return found


def _bind_all(use: Use, sets: Sequence[Tensors], shape: Shape) -> list[Any]:
    return [use.bind(tensors, shape) for tensors in sets]


def _admit(
    group: Group, candidate: Candidate, bind: Any, present: Results, device: torch.device
) -> Work | str:
    """Prepare what is timed of one candidate, or say why it is not."""
    calls = bind()
    try:
        with forced(group.kernel, candidate):
            work = prepare(calls, device)
            reason = difference(work.run(), present)
    except Exception as error:  # whatever a launch raises drops the candidate
        return f"failed: {type(error).__name__}: {error}"[:200]
    return reason or work
