"""Who is fastest for each kind of call: rows for the table of `stochca_kernels.dispatch`."""

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple
from unittest import mock

from bench.kernels.floors import Ceilings
from bench.kernels.measure import Case, measure
from bench.kernels.measure import Settings as CaseSettings
from bench.kernels.paths import (
    CLASS_ROW_CROSS,
    CLASS_ROW_SELF,
    CROSS,
    PROJECTION_WITH_SOURCE,
    SELF,
    Pass,
    Path,
)
from bench.kernels.providers import Provider
from bench.kernels.shapes import MAIN
from bench.tune.timing import Settings
from stochca_kernels import tiles
from stochca_kernels.dispatch import Winner


class Kind(NamedTuple):
    """One kind of call: its name in the table, its paths, who competes on each, and in which pass."""

    name: str
    paths: tuple[Path, ...]
    competitors: Mapping[str, Any]
    which: Pass = "forward+backward"


def _implementation(name: Any) -> Any:
    return lambda path: path.ours_with(name)


_EITHER = {"triton": _implementation("triton"), "sdpa": _implementation("sdpa")}
KINDS = (
    Kind("self-attention", (SELF,), _EITHER),
    Kind("cross-attention", (CROSS,), _EITHER),
    Kind("attention without gradient", (SELF,), _EITHER, "forward"),
    Kind("few rows", (CLASS_ROW_SELF, CLASS_ROW_CROSS), _EITHER),
    Kind(
        "full rows of a projection",
        (PROJECTION_WITH_SOURCE,),
        {"fused": _implementation("triton"), "gemm": lambda path: path.others["product + ours"]},
    ),
)
BOUNDS = (208, 272, None)


@contextmanager
def installed(rows: Mapping[tuple[str, str, str], Any]) -> Iterator[None]:
    """Have launchers find these rows in the table of tiles."""
    with mock.patch.dict(tiles._TABLE, rows):
        tiles._chosen.cache_clear()
        yield
    tiles._chosen.cache_clear()


def bound_of(length: int) -> int | None:
    """The most keys of the row that serves a length."""
    return next(bound for bound in BOUNDS if bound is None or length <= bound)


def time_kind(kind: Kind, settings: Settings) -> Iterator[dict[str, Any]]:
    """Time everybody who competes at every shape; each is checked first."""
    # No floor is asked for: these only say how many inputs are needed.
    ceilings = Ceilings(copy_bytes_per_s=4e12, matmul_flops_per_s=5e14)
    measured = CaseSettings(settings.device, settings.dtype, settings.rounds, ceilings)
    for path in kind.paths:
        competitors = [Provider(name, run(path)) for name, run in kind.competitors.items()]
        for shape in MAIN:
            if shape in path.shapes:
                yield measure(Case(path, kind.which, shape), competitors, measured)


def choose_winners(
    kind: Kind, cases: Sequence[Mapping[str, Any]], origin: str
) -> list[tuple[int | None, Winner]]:
    """The smallest geometric mean of median times among those who were timed in every case, by length."""
    found: list[tuple[int | None, Winner]] = []
    for bound in BOUNDS:
        here = [case for case in cases if bound_of(case["shape"]["length"]) == bound]
        means = {name: _mean_us(here, name) for name in kind.competitors}
        best = min(means, key=means.__getitem__)
        if here and means[best] < math.inf:
            if found and found[-1][1].choice == best:
                found.pop()  # this row serves its lengths as well
            found.append((bound, Winner(best, origin)))
    return found


def _mean_us(cases: Sequence[Mapping[str, Any]], name: str) -> float:
    times = [case.get("providers", {}).get(name, {}).get("p50_us", math.inf) for case in cases]
    return math.exp(sum(map(math.log, times)) / len(times)) if times else math.inf
