"""What the operator costs the host: microseconds of Python for each call, on a CPU without a GPU.

`python -m bench.host` runs the real path, Triton's own included, up to where a program would be launched: a
stand-in driver says that there is an H100, and nothing is compiled or computed. What CUDA itself needs for a
launch, about 5 us, is left out. Run it without `TRITON_INTERPRET`.
"""

import argparse
import cProfile
import os
import pstats
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.compiler import CompiledKernel
from triton.runtime.driver import driver
from triton.runtime.jit import JITFunction

import stochca_kernels.ops  # noqa: F401, imports the kernels before anything says to interpret them
from stochca_kernels import Projection, stochca_attention
from stochca_kernels.projection import project

Call = Callable[[], Any]


class Program(CompiledKernel):
    """What Triton compiled for one key; to launch it does nothing."""

    launched: Callable[..., Any] = staticmethod(lambda *_: None)

    def __init__(self, kernel: Any, key: str) -> None:
        self.name, self.key = kernel.__name__, key
        self.src, self.function, self.packed_metadata = None, 0, ()
        self._run = lambda *grid_and_arguments: Program.launched(self, *grid_and_arguments)

    def _init_handles(self) -> None:
        pass


def _compile(kernel: Any, key: str, signature: Any, device: int, *_: Any, **__: Any) -> Program:
    program = kernel.device_caches[device][0][key] = Program(kernel, key)
    return program


@contextmanager
def without_gpu() -> Iterator[None]:
    """Launch programs that do nothing, from CPU tensors."""
    h100 = SimpleNamespace(
        get_current_device=lambda: 0,
        get_current_stream=lambda device: 0,
        get_current_target=lambda: GPUTarget("cuda", 90, 32),
    )
    before = driver._active
    driver.set_active(h100)
    try:
        with (
            mock.patch.object(JITFunction, "_do_compile", _compile),
            mock.patch.dict(os.environ, {"TRITON_INTERPRET": "1", "STOCHCA_IMPL": "triton"}),
        ):
            yield
    finally:
        driver._active = before


def calls(batch: int = 1, heads: int = 12, length: int = 197, head_dim: int = 64) -> dict[str, Call]:
    """What a step asks of the operator: forward, and backward of what needs one."""

    def draw(*shape: int) -> Tensor:
        return torch.zeros(shape, dtype=torch.bfloat16)

    def split() -> tuple[Tensor, ...]:
        packed = draw(batch, length, 3, heads, head_dim)
        return packed.permute(2, 0, 3, 1, 4).unbind(0)

    packed = draw(batch, length, 3, heads, head_dim).requires_grad_()
    q, source_q = split()[0].requires_grad_(), split()[0]
    width = heads * head_dim
    side = Projection(draw(batch, length, width), draw(2 * width, width), draw(2 * width))
    k, v = project(side, heads)
    coins = torch.zeros(batch, dtype=torch.bool)
    forwards: dict[str, tuple[Tensor, Call]] = {
        "self": (packed, lambda: stochca_attention(packed, None, None, False)),
        "cross": (q, lambda: stochca_attention(q, None, (k, v), True)),
        "per sample": (packed, lambda: stochca_attention(packed, None, (k, v), coins)),
    }
    found: dict[str, Call] = {}
    for name, (leaf, forward) in forwards.items():
        found[f"{name}, forward"] = forward
        found[f"{name}, backward"] = _backward(leaf, forward)

    @torch.no_grad()
    def source() -> Tensor:
        return stochca_attention(source_q, (k, v), None, False)

    found["source, forward"] = source
    return found


def _backward(leaf: Tensor, forward: Call) -> Call:
    out = forward()
    grad = torch.zeros_like(out)
    return lambda: torch.autograd.grad(out, leaf, grad, retain_graph=True)


def microseconds(call: Call, number: int = 10, rounds: int = 300) -> float:
    """Time of a call in the fastest of so many rounds: whatever else runs can only add to it."""
    for _ in range(20):
        call()
    times = []
    for _ in range(rounds):
        start = time.perf_counter()
        for _ in range(number):
            call()
        times.append((time.perf_counter() - start) / number * 1e6)
    return min(times)


def python_calls(call: Call) -> int:
    """How many Python functions a call calls, once it has been made before: always the same number."""
    count = 0

    def see(frame: Any, event: str, argument: Any) -> None:
        nonlocal count
        count += event == "call"

    for _ in range(3):
        call()
    sys.setprofile(see)
    try:
        call()
    finally:
        sys.setprofile(None)
    return count - 1  # without `call` itself


def main() -> None:
    """Time and print each call."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", default="", help="calls whose name has this in it")
    parser.add_argument("--profile", action="store_true", help="print what the time of each call is made of")
    options = parser.parse_args()
    torch.set_num_threads(1)
    with without_gpu(), torch.autocast("cpu", torch.bfloat16):
        for name, call in calls().items():
            if options.only not in name:
                continue
            print(f"{name:22} {microseconds(call):6.1f} us {python_calls(call):5} Python calls", flush=True)
            if options.profile:
                profile = cProfile.Profile()
                with profile:
                    for _ in range(1000):
                        call()
                pstats.Stats(profile).sort_stats("tottime").print_stats(30)


if __name__ == "__main__":
    main()
