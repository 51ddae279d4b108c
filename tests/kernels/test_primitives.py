"""Pieces that several kernels share."""

import numpy as np
import pytest
import torch

pytest.importorskip("triton")

import triton
import triton.language as tl

from stochca_kernels.primitives import round_to_tf32

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@triton.jit
def _round_kernel(x_ptr, out_ptr, SIZE: tl.constexpr):
    offsets = tl.arange(0, SIZE)
    tl.store(out_ptr + offsets, round_to_tf32(tl.load(x_ptr + offsets)))


@pytest.mark.filterwarnings("ignore:overflow encountered")
def test_tf32_is_the_nearest_number_of_eleven_bits():
    x = torch.randn(64) * 10.0 ** torch.arange(-16, 16).repeat(2)
    largest_nan = torch.tensor([0x7FFFFFFF], dtype=torch.int32).view(torch.float32)
    x[:6] = torch.cat(
        [largest_nan, torch.tensor([float("inf"), -float("inf"), 0.0, 1 + 2**-11, -1 - 2**-11])]
    )
    x, out = x.to(DEVICE), torch.empty(64, device=DEVICE)
    _round_kernel[(1,)](x, out, 64)
    exact = x.double().cpu().numpy()
    mantissa, exponent = np.frexp(exact)
    # Ties go away from zero.
    nearest = np.copysign(np.floor(np.abs(mantissa) * 2**11 + 0.5), exact) * 2.0 ** (exponent - 11)
    nearest[1:3] = exact[1:3]
    np.testing.assert_array_equal(out.double().cpu().numpy(), nearest)
