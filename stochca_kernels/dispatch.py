"""Which implementation "auto" runs, and which kernels "triton" is made of: one table, and the user's word.

The environment variable `STOCHCA_IMPL` ("triton", "sdpa" or "reference") replaces what "auto" selects, and
`STOCHCA_FUSED_PROJECTION` ("1" or "0") says whether "triton" computes a source's keys and values inside the
attention kernel. Both are read at every call, and under `torch.compile` when a graph is made.
"""

import importlib.util
import os
from functools import lru_cache
from typing import Any, Literal, NamedTuple

import torch

from stochca_kernels.checks import is_head_size
from stochca_kernels.tiles import gpu_of, plans

Impl = Literal["auto", "triton", "sdpa", "reference"]

_ALLOWED = {"STOCHCA_IMPL": ("triton", "sdpa", "reference"), "STOCHCA_FUSED_PROJECTION": ("0", "1")}

HAS_TRITON = importlib.util.find_spec("triton") is not None


class Winner(NamedTuple):
    """What is fastest for one kind of call.

    Args:
        choice: Its name.
        origin: "predicted", or the GPU and the commit where it was timed (`python -m bench.tune`).
    """

    choice: str
    origin: str


Kind = Literal["self-attention", "cross-attention", "attention without gradient", "few rows"]
"""What "auto" chooses by: whose gradient follows, of queries, keys and values, of queries alone, or none; and
fewer queries than D that ask a `Projection`. A coin per sample counts as self-attention."""

_H100 = "NVIDIA H100 80GB HBM3, commit 1a6b81f"
# (kind of call, GPU, most keys): the first row that fits is used. GPU "any" stands for all.
_WINNERS: tuple[tuple[str, str, int | None, Winner], ...] = (
    ("self-attention", "sm_90", 256, Winner("triton", _H100)),
    ("self-attention", "sm_90", None, Winner("sdpa", _H100)),
    ("attention without gradient", "sm_90", None, Winner("sdpa", _H100)),
    ("self-attention", "any", None, Winner("triton", "predicted")),
    ("cross-attention", "any", None, Winner("triton", "predicted")),
    ("attention without gradient", "any", None, Winner("triton", "predicted")),
    ("few rows", "any", None, Winner("triton", "predicted")),
    # A program per head reads the tokens once per head from the L2 cache, a GEMM once per tile.
    ("full rows of a projection", "any", None, Winner("gemm", "predicted")),
)


def winner(kind: str, gpu: str, length: int) -> Winner:
    """Look up what is fastest.

    Args:
        kind: A `Kind`, whose choices are "triton" and "sdpa"; or "full rows of a projection": "fused", or
            "gemm" and attention over what it wrote.
        gpu: As in `tiles.gpu_of`.
        length: Number of keys.
    """
    for row_kind, row_gpu, most_keys, found in _WINNERS:
        if row_kind == kind and row_gpu in (gpu, "any") and (most_keys is None or length <= most_keys):
            return found
    raise KeyError(kind)


def select_impl(
    device: torch.device,
    dtype: torch.dtype,
    head_dim: int,
    length: int = 197,
    kind: Kind = "self-attention",
) -> tuple[Impl, str]:
    """Say which implementation "auto" runs, and why.

    Args:
        device: Where the inputs are.
        dtype: Their dtype.
        head_dim: D.
        length: Number of keys.
        kind: Of the call.

    Returns:
        The implementation, and the reason in words.

    Raises:
        ValueError: `STOCHCA_IMPL` names none.
    """
    forced = _from_environment("STOCHCA_IMPL")
    if forced is not None:
        return forced, f"STOCHCA_IMPL={forced} is set"
    if torch.compiler.is_compiling():  # which sees through a cache
        return _select(device, dtype, head_dim, length, kind)
    return _selected(device, dtype, head_dim, length, kind)


def _select(
    device: torch.device, dtype: torch.dtype, head_dim: int, length: int, kind: Kind
) -> tuple[Impl, str]:
    if device.type != "cuda" or torch.version.hip:
        return "sdpa", f"the Triton kernels are selected on NVIDIA GPUs alone, the device is {device}"
    if not HAS_TRITON:
        return "sdpa", "triton is not installed"
    if (capability := _compute_capability(device)) < (8, 0):
        return "sdpa", f"the Triton kernels need compute capability 8.0, {device} has {capability}"
    if dtype not in (torch.float16, torch.bfloat16):
        return "sdpa", f"the Triton kernels are selected for 16-bit inputs alone, the dtype is {dtype}"
    if not is_head_size(head_dim):
        return "sdpa", f"the Triton kernels take head sizes 16 to 128 in steps of 8, got {head_dim}"
    choice, origin = winner(kind, _gpu_of(device), length)
    how = "predicted" if origin == "predicted" else f"measured ({origin})"
    reason = f"{choice} is {how} to be the fastest in {kind} on {device}, compute capability {capability}"
    return ("triton" if choice == "triton" else "sdpa"), reason


_selected = lru_cache(maxsize=1024)(_select)


def fuses_projection(device: torch.device, length: int) -> bool:
    """Whether "triton" computes keys and values of a source inside the attention kernel, full rows asking.

    Raises:
        ValueError: `STOCHCA_FUSED_PROJECTION` is neither "0" nor "1".
    """
    forced = _from_environment("STOCHCA_FUSED_PROJECTION")
    if forced is not None:
        return forced == "1"
    return winner("full rows of a projection", _gpu_of(device), length).choice == "fused"


@torch.compiler.assume_constant_result
def has_token_kernels(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether few rows can ask the tokens themselves: float32 products take too many registers on NVIDIA."""
    return (
        dtype.itemsize == 2
        or device.type == "cpu"
        or bool(plans("tokens_bwd", gpu_of(device), "ieee", 768, 1))
    )


@torch.compiler.assume_constant_result
def _from_environment(name: str) -> Any:
    value = os.environ.get(name) or None
    if value is not None and value not in _ALLOWED[name]:
        raise ValueError(f"the environment variable {name} must be one of {_ALLOWED[name]}, got {value!r}")
    return value


@torch.compiler.assume_constant_result
def _compute_capability(device: torch.device) -> tuple[int, int]:
    return torch.cuda.get_device_capability(device)


@torch.compiler.assume_constant_result
def _gpu_of(device: torch.device) -> str:
    return gpu_of(device)
