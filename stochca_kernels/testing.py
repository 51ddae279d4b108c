"""Inputs and the error budget that tests and benchmarks share."""

from typing import Literal, NamedTuple

import torch
from torch import Tensor


class Inputs(NamedTuple):
    """Arguments of the operator, all views of packed projections as a ViT makes them."""

    q: Tensor
    kv: tuple[Tensor, Tensor]
    source_kv: tuple[Tensor, Tensor]
    source_q: Tensor

    def to(self, dtype: torch.dtype) -> "Inputs":
        """Copies in another dtype, without gradients of their own."""
        q, (k, v), (source_k, source_v), source_q = self
        cast = [t.detach().to(dtype) for t in (q, k, v, source_k, source_v, source_q)]
        return Inputs(cast[0], (cast[1], cast[2]), (cast[3], cast[4]), cast[5])


def make_inputs(
    batch: int,
    heads: int,
    len_q: int,
    len_kv: int,
    len_source: int,
    head_dim: int,
    *,
    dtype: torch.dtype = torch.float32,
    device: str | torch.device = "cpu",
    seed: int = 0,
) -> Inputs:
    """Draw standard normal inputs; every tensor is a strided view of a packed `[B, N, 3, H, D]` one."""
    generator = torch.Generator().manual_seed(seed)

    def packed(length: int) -> tuple[Tensor, ...]:
        x = torch.randn(batch, length, 3, heads, head_dim, generator=generator).to(device, dtype)
        return x.permute(2, 0, 3, 1, 4).unbind(0)

    q = packed(len_q)[0]
    _, k, v = packed(len_kv)
    source_q, source_k, source_v = packed(len_source)
    return Inputs(q, (k, v), (source_k, source_v), source_q)


def assert_close_to_exact(
    actual: Tensor,
    eager: Tensor,
    exact: Tensor,
    *,
    factor: float = 2.0,
    measure: Literal["max", "rms"] = "max",
) -> None:
    """Assert that the error of `actual` is at most `factor` times eager torch's in the same dtype.

    Args:
        actual: What is tested.
        eager: Plain eager torch in the same dtype.
        exact: The float64 result.
        factor: How often eager's error is allowed.
        measure: The largest error of all elements, or its root mean square, which depends less on the draw.

    One rounding of the largest exact value to the dtype is always allowed: eager may hit it exactly by luck.
    """
    assert actual.dtype == eager.dtype
    assert actual.shape == exact.shape
    if exact.numel() == 0:
        return
    errors = [(t.double() - exact).abs() for t in (actual, eager)]
    error, budget = (e.max().item() if measure == "max" else e.square().mean().sqrt().item() for e in errors)
    rounding = torch.finfo(actual.dtype).eps * exact.abs().max().item()
    assert error <= factor * budget + rounding, f"error {error:.3g}, eager torch has {budget:.3g}"
