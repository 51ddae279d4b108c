"""Compile a kernel exactly as a launch would, for a GPU that need not be there."""

import re
from collections.abc import Mapping, Sequence
from typing import Any
from unittest import mock

from triton.backends.compiler import GPUTarget
from triton.runtime import driver

from bench.programs import _nvidia_usage


def compile_launch(
    kernel: Any, arguments: Sequence[Any], constants: Mapping[str, Any], gpu: str
) -> tuple[dict[str, int], str]:
    """Compile, and leave the program in Triton's cache, where a launch on such a GPU will find it.

    Args:
        kernel: A Triton or Gluon kernel.
        arguments: Those of the launch; tensors may be without memory.
        constants: What it is compiled for, with warps and stages.
        gpu: As in "sm_90".

    Returns:
        Registers of a thread, spilled bytes of a thread, shared memory and warps of a program, and `wgmma`
        instructions; and the program as PTX.
    """
    with mock.patch.object(driver, "_active", _Absent(gpu)):
        compiled = kernel.warmup(*arguments, grid=(1,), **constants)
    text = compiled.asm["ptx"]
    figures = {
        **_nvidia_usage(compiled.asm["cubin"]),
        "shared": compiled.metadata.shared,
        "warps": int(re.findall(r"\.reqntid (\d+)", text)[0]) // 32,
        "wgmma": len(re.findall(r"wgmma\.mma_async", text)),
    }
    return figures, text


class _Absent:
    """Enough of a driver for a compiler, which asks what it compiles for."""

    def __init__(self, gpu: str) -> None:
        self.capability = int(gpu.removeprefix("sm_"))

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self.capability, 32)

    def get_current_device(self) -> int:
        return self.capability  # a kernel remembers its programs by device

    def get_current_stream(self, device: int) -> int:
        return 0
