"""The portable implementation against the definition, at every length and head size of real ViTs."""

import pytest
import torch
from torch.nn import functional as F

from stochca_kernels import Projection, stochca_attention
from stochca_kernels.testing import assert_close_to_exact, make_inputs

LENGTHS = (1, 16, 17, 64, 65, 127, 128, 196, 197, 208, 209, 257)
HEAD_DIMS = (16, 32, 64, 72, 80, 88, 128)
DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}

dtypes = pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)


def results(x, coin, impl):
    leaves = [t.detach().requires_grad_() for t in (x.q, *x.kv)]
    out, source_out = stochca_attention(
        leaves[0], tuple(leaves[1:]), x.source_kv, coin, source_q=x.source_q, impl=impl
    )
    grad = torch.randn(out.shape, generator=torch.Generator().manual_seed(1)).bfloat16().to(out.dtype)
    return out, source_out, *torch.autograd.grad(out, leaves, grad)


@dtypes
@pytest.mark.parametrize("head_dim", HEAD_DIMS, ids=lambda d: f"D{d}")
@pytest.mark.parametrize("length", LENGTHS, ids=lambda n: f"N{n}")
def test_error_is_at_most_twice_that_of_eager_torch(length, head_dim, dtype):
    x = make_inputs(2, 1, length, length, length + 3, head_dim, dtype=dtype)
    for coin in (False, True, torch.tensor([True, False])):
        runs = (
            results(x, coin, "sdpa"),
            results(x, coin, "reference"),
            results(x.to(torch.float64), coin, "reference"),
        )
        outputs, gradients = list(zip(*runs, strict=True))[:2], list(zip(*runs, strict=True))[2:]
        for actual, eager, exact in outputs:
            assert_close_to_exact(actual, eager, exact)
        for actual, eager, exact in gradients:
            if length == 1:  # dQ and dK are zero, exactly so in eager torch; torch's flash backward rounds
                assert (actual - exact).abs().max() <= 8 * torch.finfo(dtype).eps * max(1, exact.abs().max())
            else:
                assert_close_to_exact(actual, eager, exact, measure="rms")


@dtypes
@pytest.mark.parametrize("length", [1, 17, 197, 257], ids=lambda n: f"N{n}")
@pytest.mark.parametrize("len_q", [1, 2], ids=lambda n: f"Nq{n}")
def test_few_rows_without_keys_are_as_exact_as_projecting(len_q, length, dtype):
    generator = torch.Generator().manual_seed(0)

    def draw(*shape, scale=1.0):
        return (scale * torch.randn(shape, generator=generator)).to(dtype)

    q, x = draw(2, 3, len_q, 64), draw(2, length, 192)
    weight, bias = draw(2 * 192, 192, scale=192**-0.5), draw(2 * 192)
    grad = draw(2, 3, len_q, 64)
    runs = []
    for impl, to in (("sdpa", dtype), ("reference", dtype), ("reference", torch.float64)):
        leaves = [t.to(to).detach().requires_grad_() for t in (q, x, weight, bias)]
        out = stochca_attention(leaves[0], Projection(*leaves[1:]), None, False, impl=impl)
        dq, dx, dweight, dbias = torch.autograd.grad(out, leaves, grad.to(to))
        # The key bias cancels in the softmax; eager torch returns rounding errors for its gradient.
        runs.append((out, dq, dx, dweight, dbias.chunk(2)[1]))
        if impl == "sdpa":
            assert torch.equal(dbias.chunk(2)[0], torch.zeros_like(dbias.chunk(2)[0]))
    for actual, eager, exact in zip(*runs, strict=True):
        assert_close_to_exact(actual, eager, exact)


def test_few_rows_compute_neither_keys_nor_values(monkeypatch):
    calls = []
    linear = F.linear
    monkeypatch.setattr(F, "linear", lambda *args: calls.append(args) or linear(*args))
    weight = torch.randn(2 * 2 * 16, 8)
    for len_q, expected in ((1, 0), (15, 0), (16, 1)):
        calls.clear()
        kv = Projection(torch.randn(2, 5, 8), weight)
        stochca_attention(torch.randn(2, 2, len_q, 16), kv, None, False, impl="sdpa")
        assert len(calls) == expected
