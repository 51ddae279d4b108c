"""The least time that a pass can take: its bytes over measured bandwidth, its FLOPs over a measured rate."""

from dataclasses import dataclass

import torch

from bench.kernels.clock import Work, percentiles, time_rounds
from bench.kernels.paths import Pass, Path, Tensors
from bench.kernels.providers import Results
from bench.kernels.shapes import Shape


@dataclass(frozen=True)
class Ceilings:
    """What the device reaches.

    Args:
        copy_bytes_per_s: Bytes read plus bytes written by a large copy on the device.
        matmul_flops_per_s: Rate of a large matrix product in the dtype that is measured.
    """

    copy_bytes_per_s: float
    matmul_flops_per_s: float


def measure_ceilings(dtype: torch.dtype, rounds: int, device: torch.device) -> Ceilings:
    """Time a large copy and a large product of random numbers."""
    numbers, side = (2**29, 8192) if device.type == "cuda" else (2**20, 256)
    source = torch.randn(numbers, device=device)
    target = torch.empty_like(source)
    a, b = (torch.randn(side, side, device=device).to(dtype) for _ in range(2))
    work = {
        "copy": Work(lambda: target.copy_(source), "copy"),
        "matmul": Work(lambda: a @ b, "matmul"),
    }
    samples = time_rounds(work, rounds, device)
    seconds = {name: percentiles(taken)["p50_us"] / 1e6 for name, taken in samples.items()}
    return Ceilings(2 * source.nbytes / seconds["copy"], 2 * side**3 / seconds["matmul"])


def pass_bytes(path: Path, tensors: Tensors, results: Results, which: Pass) -> int:
    """Bytes of all inputs, read once, and of all results, written once.

    Args:
        path: Names inputs that need not be read.
        tensors: The inputs, and "grad".
        results: Of this pass.
        which: The pass. A backward also reads the output, which is as large as its gradient.
    """
    read = {name: t for name, t in tensors.items() if name not in path.unread}
    if which == "forward":
        read.pop("grad", None)
    if which == "backward":
        read["out"] = tensors["grad"]
    return sum(t.numel() * t.element_size() for t in (*read.values(), *results.values()))


def pass_flops(path: Path, shape: Shape, which: Pass) -> float:
    """Operations of a pass."""
    forward, backward = path.flops(shape)
    return {"forward": forward, "backward": backward, "forward+backward": forward + backward}[which]
