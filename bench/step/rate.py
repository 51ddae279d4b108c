"""What the device reaches: the rate of a large matrix product, by which utilisation is measured."""

from collections.abc import Iterable
from functools import partial

import torch

from bench.kernels.clock import Work, time_rounds

ROUNDS = 20
GPU_SIDE, CPU_SIDE = 8192, 512


def matmul_rates(dtypes: Iterable[torch.dtype], device: torch.device) -> dict[torch.dtype, float]:
    """FLOP/s of a product of two square matrices of random numbers, in each dtype: the best of some."""
    side = GPU_SIDE if device.type == "cuda" else CPU_SIDE
    found = {}
    for dtype in dtypes:
        a, b = (torch.randn(side, side, device=device).to(dtype) for _ in range(2))
        samples = time_rounds({"matmul": Work(partial(torch.matmul, a, b), "matmul")}, ROUNDS, device)
        found[dtype] = 2 * side**3 / (min(samples["matmul"]) / 1e6)
    return found
