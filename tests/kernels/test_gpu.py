"""What only a GPU can show: bfloat16, TF32, sizes beyond int32, races, and CUDA graphs."""

import pytest
import torch

from stochca_kernels import stochca_attention
from stochca_kernels.testing import assert_close_to_exact, make_inputs

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU"),
]

DTYPES = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)


def run(x, coins, impl):
    leaves = [t.detach().requires_grad_() for t in (x.q, *x.kv)]
    out, source_out = stochca_attention(
        leaves[0], tuple(leaves[1:]), x.source_kv, coins, source_q=x.source_q, impl=impl
    )
    grad = torch.randn(out.shape, generator=torch.Generator().manual_seed(1)).to(out.device, torch.bfloat16)
    return out.detach(), source_out, *torch.autograd.grad(out, leaves, grad.to(out.dtype))


@DTYPES
@pytest.mark.parametrize("head_dim", [16, 64, 72, 80, 88, 128])
@pytest.mark.parametrize("length", [1, 17, 64, 197, 257, 785])
def test_error_is_at_most_twice_that_of_eager_torch(dtype, length, head_dim):
    x = make_inputs(4, 3, length, length, length, head_dim, dtype=dtype, device="cuda")
    coins = torch.tensor([False, True, True, False], device="cuda")
    results = (
        run(x, coins, "triton"),
        run(x, coins, "reference"),
        run(x.to(torch.float64), coins, "reference"),
    )
    for actual, eager, exact in zip(*results, strict=True):
        if exact.abs().max() < 1e-12:
            # With one key the scores have no gradient: two equal sums cancel, up to their rounding.
            assert actual.abs().max() < 1e-5
        else:
            assert_close_to_exact(actual, eager, exact)


def test_tf32_is_used_where_torch_may_use_it(monkeypatch):
    x = make_inputs(2, 2, 197, 197, 197, 64, device="cuda")
    exact = run(x.to(torch.float64), False, "reference")
    errors = {}
    for precision in ("ieee", "tf32"):
        monkeypatch.setattr(torch.backends.cuda.matmul, "fp32_precision", precision)
        results = zip(run(x, False, "triton"), exact, strict=True)
        errors[precision] = max((a - b).abs().max().item() for a, b in results)
    assert errors["ieee"] < 1e-5
    assert errors["ieee"] < errors["tf32"] < 1e-1


@DTYPES
def test_a_hundred_repeats_are_bitwise_equal(dtype):
    x = make_inputs(8, 6, 197, 197, 197, 64, dtype=dtype, device="cuda")
    coins = torch.arange(8, device="cuda") % 2 == 1
    first = run(x, coins, "triton")
    for _ in range(100):
        assert all(torch.equal(a, b) for a, b in zip(run(x, coins, "triton"), first, strict=True))


def test_more_than_2_to_the_31_elements():
    batch, heads, length, head_dim = 2700, 16, 197, 256 // 4
    q = torch.zeros(batch, length, 4 * heads, head_dim, dtype=torch.bfloat16, device="cuda")
    assert q.numel() > 2**31
    small = make_inputs(1, heads, length, length, length, head_dim, dtype=torch.bfloat16, device="cuda")
    view = q.unflatten(2, (4, heads)).permute(2, 0, 3, 1, 4)
    for place, t in zip(view[:3], (small.q, *small.kv), strict=True):
        place[-1] = t[0]
    leaves = [t[-2:] for t in view[:3]]
    out = stochca_attention(view[0], (view[1], view[2]), None, False, impl="triton")
    expected = stochca_attention(leaves[0], (leaves[1], leaves[2]), None, False, impl="triton")
    assert torch.equal(out[-2:], expected)
    assert out[:-1].count_nonzero() == 0


def test_more_heads_than_a_grid_axis_holds():
    x = make_inputs(1, 1, 1, 3, 3, 16, device="cuda")
    q, k, v = (t.expand(70_000, 1, -1, -1) for t in (x.q, *x.kv))
    out = stochca_attention(q, (k, v), None, False, impl="triton")
    assert torch.equal(out, out[:1].expand_as(out))
    torch.testing.assert_close(out[:1], stochca_attention(x.q, x.kv, None, False, impl="reference"))


def test_cuda_graph_replays_with_other_coins():
    x = make_inputs(4, 2, 197, 197, 197, 64, dtype=torch.bfloat16, device="cuda")
    coins = torch.zeros(4, dtype=torch.bool, device="cuda")
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    grad = torch.ones_like(x.q)
    leaves = [t.detach().requires_grad_() for t in (x.q, *x.kv)]

    def step():
        out = stochca_attention(leaves[0], tuple(leaves[1:]), x.source_kv, coins, impl="triton")
        return out, *torch.autograd.grad(out, leaves, grad)

    with torch.cuda.stream(stream):
        step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    for pattern in ([0, 0, 0, 0], [1, 0, 1, 0], [1, 1, 1, 1]):
        coins.copy_(torch.tensor(pattern, dtype=torch.bool))
        graph.replay()
        for actual, expected in zip(captured, step(), strict=True):
            assert torch.equal(actual, expected)
