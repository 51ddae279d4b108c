"""What every launcher needs beside its kernel."""

import contextlib
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from triton.runtime.errors import OutOfResources

from stochca_kernels.tiles import Tiles

# Rows of the table that turned out to need more than a GPU has.
_TOO_LARGE: set[tuple[Any, ...]] = set()


def launch_largest(kernel: Any, q: Tensor, rows: Sequence[Tiles], launch: Callable[[Tiles], None]) -> None:
    """Call `launch` with the first of `rows` whose program fits the GPU of `q`.

    Raises:
        ValueError: There is no row: the table has no tiles for this GPU and dtype.
        OutOfResources: Not even the last one fits.
    """
    if not rows:
        raise ValueError(
            f'impl="triton" has no tiles of {kernel} for {q.dtype} on {q.device}: use impl="sdpa"'
        )
    for tiles in rows:
        program = (kernel, q.device, q.dtype, q.shape[-1], tiles)
        if program in _TOO_LARGE and tiles is not rows[-1]:
            continue
        try:
            with on_device_of(q.device):
                return launch(tiles)
        except OutOfResources:
            if tiles is rows[-1]:
                raise
            _TOO_LARGE.add(program)


def empty_token_major(like: Tensor, shape: tuple[int, ...]) -> Tensor:
    """Allocate `[B, H, N, D]` that lies as `[B, N, H, D]` in memory, so that merging heads is a view."""
    batch, heads, length, head_dim = shape
    return like.new_empty((batch, length, heads, head_dim)).transpose(1, 2)


def stride_unit(*tensors: Tensor) -> int:
    """What the strides of samples and heads are multiples of: 8 elements where that must be said, else 1.

    Of an argument Triton asks only whether 16 divides it. Heads of 72 or 88 start at multiples of 16 bytes,
    but it would load them element by element.
    """
    if tensors[0].shape[-1] % 16 == 0:
        return 1
    strides = (stride for t in tensors if t.numel() > 0 for stride in t.stride()[:2])
    return 8 if all(stride % 8 == 0 for stride in strides) else 1


def with_unit_stride(x: Tensor) -> Tensor:
    """`x`, copied where its last stride is not one, as that of an expanded gradient."""
    return x if x.stride(-1) == 1 else x.contiguous()


def on_device_of(device: torch.device) -> contextlib.AbstractContextManager[object]:
    """Make the GPU the current one: Triton launches there."""
    return torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext()
