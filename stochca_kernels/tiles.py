"""How each kernel cuts its work into tiles, by GPU, dtype and head size: one table for all launchers."""

from functools import lru_cache
from typing import Literal, NamedTuple

import torch
from torch import Tensor

Kernel = Literal["fwd", "dq", "dkdv"]


class Tiles(NamedTuple):
    """One program's work.

    Args:
        block_m: Query rows of a tile.
        block_n: Key rows of a tile.
        num_warps: Warps of a program.
        num_stages: Tiles in flight in the main loop.
        origin: "compiled" where registers and shared memory were read from the compiled program
            (Triton 3.6.0, `tests/kernels/compile_all.py`); the GPU and the commit where it was timed.
    """

    block_m: int
    block_n: int
    num_warps: int
    num_stages: int
    origin: str


# (kernel, GPU, arithmetic): tiles for head sizes up to 64, and up to 128.
_TABLE: dict[tuple[str, str, str], tuple[Tiles, Tiles]] = {
    ("fwd", "sm_80", "half"): (Tiles(64, 64, 4, 2, "compiled"), Tiles(32, 64, 4, 2, "compiled")),
    ("fwd", "sm_90", "half"): (Tiles(64, 64, 4, 2, "compiled"), Tiles(64, 64, 4, 2, "compiled")),
    ("fwd", "sm_100", "half"): (Tiles(64, 64, 4, 3, "compiled"), Tiles(64, 64, 4, 2, "compiled")),
    ("fwd", "sm_120", "half"): (Tiles(64, 64, 4, 2, "compiled"), Tiles(32, 64, 4, 2, "compiled")),
    ("fwd", "gfx942", "half"): (Tiles(64, 64, 4, 2, "compiled"), Tiles(64, 32, 4, 2, "compiled")),
    ("fwd", "nvidia", "tf32"): (Tiles(64, 32, 4, 2, "compiled"), Tiles(16, 32, 4, 2, "compiled")),
    ("fwd", "nvidia", "ieee"): (Tiles(32, 16, 8, 1, "compiled"), Tiles(16, 16, 8, 1, "compiled")),
    ("fwd", "gfx942", "ieee"): (Tiles(32, 32, 4, 1, "compiled"), Tiles(32, 16, 4, 1, "compiled")),
    ("dq", "sm_80", "half"): (Tiles(64, 32, 4, 2, "compiled"), Tiles(32, 64, 8, 2, "compiled")),
    ("dq", "sm_90", "half"): (Tiles(64, 64, 4, 2, "compiled"), Tiles(64, 64, 4, 2, "compiled")),
    ("dq", "sm_100", "half"): (Tiles(64, 64, 4, 2, "compiled"), Tiles(64, 64, 4, 2, "compiled")),
    ("dq", "sm_120", "half"): (Tiles(64, 32, 4, 2, "compiled"), Tiles(32, 64, 8, 2, "compiled")),
    ("dq", "gfx942", "half"): (Tiles(64, 32, 4, 2, "compiled"), Tiles(64, 32, 8, 2, "compiled")),
    ("dq", "nvidia", "tf32"): (Tiles(32, 32, 8, 2, "compiled"), Tiles(16, 32, 8, 2, "compiled")),
    ("dq", "nvidia", "ieee"): (Tiles(16, 16, 8, 1, "compiled"), Tiles(8, 16, 8, 1, "compiled")),
    ("dq", "gfx942", "ieee"): (Tiles(32, 32, 4, 1, "compiled"), Tiles(32, 16, 4, 1, "compiled")),
    ("dkdv", "sm_80", "half"): (Tiles(32, 64, 4, 2, "compiled"), Tiles(32, 32, 8, 2, "compiled")),
    ("dkdv", "sm_90", "half"): (Tiles(64, 64, 4, 2, "compiled"), Tiles(64, 64, 8, 2, "compiled")),
    ("dkdv", "sm_100", "half"): (Tiles(64, 64, 4, 2, "compiled"), Tiles(64, 64, 4, 2, "compiled")),
    ("dkdv", "sm_120", "half"): (Tiles(32, 64, 4, 2, "compiled"), Tiles(32, 32, 8, 2, "compiled")),
    ("dkdv", "gfx942", "half"): (Tiles(32, 64, 4, 2, "compiled"), Tiles(32, 64, 4, 2, "compiled")),
    ("dkdv", "nvidia", "tf32"): (Tiles(16, 32, 4, 2, "compiled"), Tiles(16, 16, 8, 2, "compiled")),
    ("dkdv", "nvidia", "ieee"): (Tiles(16, 16, 8, 1, "compiled"), Tiles(16, 8, 8, 1, "compiled")),
    ("dkdv", "gfx942", "ieee"): (Tiles(16, 32, 4, 1, "compiled"), Tiles(16, 32, 4, 1, "compiled")),
}


def choose_tiles(kernel: Kernel, q: Tensor) -> Tiles:
    """Choose the tiles of one launch on `q`'s device."""
    # The interpreter has no registers to spare, and the largest tiles are the fastest there.
    half = q.itemsize == 2 or q.device.type == "cpu"
    return plan(kernel, gpu_of(q.device), "half" if half else dot_precision(q), q.shape[3])


def plan(kernel: Kernel, gpu: str, arithmetic: str, head_dim: int) -> Tiles:
    """Look up the tiles.

    Args:
        kernel: Which kernel.
        gpu: "sm_80", "sm_90", "sm_100", "sm_120" or "gfx942".
        arithmetic: "half" for 16-bit inputs; "tf32" or "ieee" for float32.
        head_dim: D.
    """
    if arithmetic != "half" and gpu != "gfx942":
        gpu = "nvidia"
    return _TABLE[kernel, gpu, arithmetic][head_dim > 64]


def tail_size(block: int, *lengths: int) -> int:
    """Rows of the masked tile that follows the full tiles of `block` rows, 0 where no length leaves any."""
    tail = max(length % block for length in lengths)
    return max(16, 1 << (tail - 1).bit_length()) if tail else 0


def dot_precision(x: Tensor) -> str:
    """Precision of float32 products: TF32 where torch's own may use it, else exact."""
    if x.dtype != torch.float32 or torch.version.hip:
        return "ieee"
    return "tf32" if torch.backends.cuda.matmul.fp32_precision == "tf32" else "ieee"


@lru_cache
def gpu_of(device: torch.device) -> str:
    """Name the table's GPU that is nearest to `device`: the same matrix unit, and no more shared memory."""
    if torch.version.hip:
        return "gfx942"
    major, minor = torch.cuda.get_device_capability(device) if device.type == "cuda" else (9, 0)
    if (major, minor) in ((8, 0), (8, 7)):
        return "sm_80"
    return {9: "sm_90", 10: "sm_100", 11: "sm_100"}.get(major, "sm_120")
