"""Programs that the table is not recorded for: heads that 16 does not divide, more channels, other batches.

Prints their figures as JSON. Run it without `TRITON_INTERPRET`.
"""

import json
import sys
from unittest import mock

import torch
from triton._C.libtriton import native_specialize_impl
from triton.backends.nvidia.compiler import CUDABackend

from bench import programs
from stochca_kernels import tiles, tokens


def reports(found):
    return [programs.compile_program(program) for program in found]


def heads():
    """Programs for a head size of 72."""
    for name, call in programs.calls(torch.bfloat16, 197, 72):
        if name in ("self", "cross"):
            yield from programs.requested("sm_90", "bf16", name, call)


def width(channels):
    """Programs of few rows for so many channels, of each kernel that of the last row, which must fit."""
    for name, call in programs.token_calls(torch.bfloat16, 257, channels):
        yield from {p.kernel: p for p in programs.requested("sm_90", "bf16", name, call)}.values()


def launched(batch):
    """What Triton compiles for few rows of a batch on 132 multiprocessors: kernel, and key in its cache."""

    def empty(*shape, dtype=torch.bfloat16):
        return torch.empty(shape, dtype=dtype, device="meta")

    x, queries, lse = empty(batch, 785, 192), empty(batch, 3, 192), empty(batch, 3, dtype=torch.float32)

    def call():
        tokens.tokens_forward(queries, x, None, None, None, None, 0.125)
        tokens.tokens_backward(queries, queries, x, None, None, None, None, queries, lse, 0.125, True)

    with mock.patch.object(tiles, "_multiprocessors", return_value=132):
        return [(program.kernel, key(program)) for program in programs.requested("sm_90", "bf16", "", call)]


def key(program):
    kernel = getattr(tokens, f"_{program.kernel}_kernel")
    values = {**dict(zip(kernel.arg_names, program.arguments, strict=False)), **program.constants}

    def of(p):
        asked = p.is_const, not p.do_not_specialize, not p.do_not_specialize_on_alignment
        value = values[p.name]
        return value if p.is_constexpr else native_specialize_impl(CUDABackend, value, *asked)

    return str([of(p) for p in kernel.params])


if __name__ == "__main__":
    found = {
        "heads": reports(heads()),
        "widths": {channels: reports(width(channels)) for channels in (1536, 2048)},
        "launched": [launched(batch) for batch in (1, 2, 7, 16, 32, 64, 128)],
    }
    sys.stdout.write(json.dumps(found))
