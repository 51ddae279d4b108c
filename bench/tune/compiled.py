"""Candidates that a GPU cannot run well are found without it: all their programs are compiled first.

What is compiled here is found again in Triton's cache when it is launched for timing.
"""

import multiprocessing
import os
from collections.abc import Iterator, Sequence
from concurrent.futures import Executor, Future, ProcessPoolExecutor
from contextlib import contextmanager
from typing import Any, NamedTuple
from unittest import mock

import torch

from bench.ahead import compile_launch
from bench.programs import MODULES, SHARED_LIMIT, Program, requested
from bench.tune.candidates import Candidate
from bench.tune.groups import Group
from bench.tune.uses import USES, MetaDraw, forced
from stochca_kernels import tiles

# Fewer than these, and a compiler has left out the work: seen with Triton 3.6 on sm_100.
LEAST_REGISTERS = 24


class Figures(NamedTuple):
    """What a candidate's most demanding programs need.

    Args:
        dropped: Why it is not timed, or "".
        registers: Of a thread.
        spills: Bytes of a thread.
        shared: Bytes of a program.
        wgmma: Hopper's own matrix instructions, of the program that has the fewest.
    """

    dropped: str = ""
    registers: int = 0
    spills: int = 0
    shared: int = 0
    wgmma: int = 0


def figures(
    group: Group, candidate: Candidate, gpu: str, dtype: torch.dtype, arithmetic: str, multiprocessors: int
) -> Figures:
    """Compile a candidate for every use and shape of its group, until one of them fails."""
    found = Figures()
    if candidate is None:
        return found
    for report in _reports(group, candidate, gpu, dtype, arithmetic, multiprocessors):
        if isinstance(report, Exception):
            return found._replace(dropped=f"{type(report).__name__}: {report}".splitlines()[0][:200])
        found = Figures(
            _fault(report, SHARED_LIMIT[gpu]),
            max(found.registers, report["registers"]),
            max(found.spills, report["spills"]),
            max(found.shared, report["shared"]),
            min(found.wgmma or report["wgmma"], report["wgmma"]),
        )
        if found.dropped:
            break
    return found


def _fault(report: dict[str, int], shared_limit: int) -> str:
    if report["spills"] > 0:
        return f"spills {report['spills']} bytes"
    if report["shared"] > shared_limit:
        return f"{report['shared']} bytes of shared memory, of {shared_limit}"
    return "an empty program" if report["registers"] < LEAST_REGISTERS else ""


def _reports(
    group: Group, candidate: Candidate, gpu: str, dtype: torch.dtype, arithmetic: str, multiprocessors: int
) -> Iterator[Any]:
    """Figures of each program, or the exception that its compiler raised."""
    name = "bf16" if arithmetic == "half" else arithmetic
    for shape in (*group.shapes, *group.also):
        for use in USES[group.kernel]:
            tensors = use.draw(MetaDraw(shape, dtype))

            def call(use=use, tensors=tensors, shape=shape):
                use.bind(tensors, shape)()

            with forced(group.kernel, candidate), _multiprocessors(multiprocessors):
                programs = requested(gpu, name, shape.name, call)
            for program in programs:
                if program.row is candidate and program.kernel != "sum_splits":
                    try:
                        yield _compile(program)
                    except Exception as error:  # whatever a compiler raises drops the candidate
                        yield error


def _compile(program: Program) -> dict[str, int]:
    name = f"_{program.kernel}_kernel"
    kernel = next(getattr(module, name) for module in MODULES if hasattr(module, name))
    return compile_launch(kernel, program.arguments, program.constants, program.gpu)[0]


@contextmanager
def _multiprocessors(count: int) -> Iterator[None]:
    """Split work as on the GPU: a tensor without memory lies on none."""
    with mock.patch.object(tiles, "_multiprocessors", return_value=count):
        yield


@contextmanager
def workers(count: int) -> Iterator[Executor | None]:
    """Processes that compile; none, for this one to do it, where one is enough."""
    if count == 1:
        yield None
        return
    # Not forked: this process may hold a GPU.
    pool = ProcessPoolExecutor(count, multiprocessing.get_context("spawn"), torch.set_num_threads, (1,))
    try:
        yield pool
    finally:
        pool.shutdown(wait=False, cancel_futures=True)


def default_workers() -> int:
    """All cores but the one that launches."""
    return max(1, (os.cpu_count() or 2) - 1)


def submit(
    pool: Executor | None, group: Group, tried: Sequence[Candidate], *arguments: Any
) -> list["Future[Figures]"]:
    """Start compiling all candidates of a group."""
    if pool is not None:
        return [pool.submit(figures, group, candidate, *arguments) for candidate in tried]
    done: list[Future[Figures]] = []
    for candidate in tried:
        done.append(Future())
        done[-1].set_result(figures(group, candidate, *arguments))
    return done
