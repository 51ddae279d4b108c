"""What every launcher needs beside its kernel."""

import contextlib

import torch
from torch import Tensor


def empty_token_major(like: Tensor, shape: tuple[int, ...]) -> Tensor:
    """Allocate `[B, H, N, D]` that lies as `[B, N, H, D]` in memory, so that merging heads is a view."""
    batch, heads, length, head_dim = shape
    return like.new_empty((batch, length, heads, head_dim)).transpose(1, 2)


def on_device_of(x: Tensor) -> contextlib.AbstractContextManager[object]:
    """Make the GPU of `x` the current one: Triton launches there."""
    return torch.cuda.device(x.device) if x.device.type == "cuda" else contextlib.nullcontext()
