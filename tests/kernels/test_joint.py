"""The backward in one program per head: what it computes, what it writes, and where it gives way."""

from itertools import cycle

import pytest
import torch

pytest.importorskip("triton")

from stochca_kernels import backward, stochca_attention
from stochca_kernels.backward import attention_backward, launch_backward, packed_attention_backward
from stochca_kernels.backward_joint import has_joint_backward, launch_joint_backward
from stochca_kernels.forward import attention_forward
from stochca_kernels.projection import unpack
from stochca_kernels.testing import assert_close_to_exact, make_inputs
from stochca_kernels.tiles import plans
from tests.kernels.test_triton import (
    DEVICE,
    Shape,
    assert_an_infinite_key_that_no_query_reads_spoils_nothing,
    coins_of,
    inputs_of,
    inside_nan,
    poisoned_outputs,
    run,
)
from tests.kernels.test_triton import pytestmark as interpreter_warnings

pytestmark = [
    *interpreter_warnings,
    # On another GPU the table has no row for it.
    pytest.mark.skipif(
        DEVICE == "cuda" and not has_joint_backward(torch.empty(1, 1, 1, 64, device=DEVICE).half(), 256),
        reason="the one-program backward is for other GPUs",
    ),
]
__all__ = ["poisoned_outputs"]  # used by every test here

HALF, SINGLE = torch.float16, torch.float32
# Full and ragged parts, one or two of them; every head size; queries that are not as many as the keys.
SHAPES = [
    *(Shape(2, 1, n, n, n, 32, HALF) for n in (1, 17, 50, 64, 208, 256)),
    *(Shape(2, 1, n, n, n, 64, HALF) for n in (145, 197)),
    *(Shape(2, 1, 65, 65, 65, d, dtype) for d, dtype in ((16, SINGLE), (40, HALF), (64, SINGLE))),
    Shape(2, 2, 130, 130, 40, 24, HALF),
    Shape(2, 1, 1, 197, 65, 64, HALF),
    Shape(2, 3, 70, 17, 130, 40, HALF),
    Shape(2, 1, 33, 250, 257, 16, HALF),
]


@pytest.fixture(autouse=True)
def no_split_kernel(monkeypatch):
    """Where the table has a row for one program per head, nothing else may write dK and dV."""
    monkeypatch.setattr(backward, "_attn_bwd_dkdv_kernel", None)


def arguments(shape: Shape, coins=None):
    """Gradient, inputs, coins, output and log-sum-exp, as a launch takes them."""
    if DEVICE == "cuda":
        shape = shape._replace(dtype=HALF)
    x = inputs_of(shape)
    source_kv = (None, None) if coins is None else x.source_kv
    scale = shape.head_dim**-0.5
    out, lse, _ = attention_forward(x.q, *x.kv, *source_kv, coins, None, scale, True)
    grad = torch.randn(out.shape, generator=torch.Generator().manual_seed(1)).to(out)
    return inside_nan(grad), x.q, *x.kv, *source_kv, coins, inside_nan(out), inside_nan(lse), scale


def in_order(x: torch.Tensor, order: tuple[int, ...]) -> torch.Tensor:
    """The same values with the dimensions in another order in memory."""
    return inside_nan(x.permute(order).contiguous().permute([order.index(i) for i in range(4)]))


@pytest.mark.parametrize(("shape", "coin"), [*zip(SHAPES, cycle(["self", "mixed"]), strict=False)], ids=str)
def test_error_is_at_most_that_of_eager_torch_times_a_constant(shape, coin):
    if DEVICE == "cuda" and shape.dtype == SINGLE:
        pytest.skip("only 16-bit inputs have a row of the table on a GPU")
    coin = coins_of(shape.batch) if coin == "mixed" else False
    x = inputs_of(shape)
    actual = run(x, coin, "triton", with_source_q=False)
    eager = run(x, coin, "reference", with_source_q=False)
    exact = run(x.to(torch.float64), coin, "reference", with_source_q=False)
    for name in actual:
        if exact[name].abs().max() < 1e-12:
            # With one key the scores have no gradient: two equal sums cancel, up to their rounding.
            assert actual[name].abs().max() < 1e-5, name
        else:
            factor = 3.0 if name in ("dq", "dk", "dv") else 2.0
            assert_close_to_exact(actual[name], eager[name], exact[name], factor=factor)
            assert_close_to_exact(actual[name], eager[name], exact[name], measure="rms")


def test_samples_that_read_the_source_get_zero_dk_and_dv_and_no_dq():
    coins = torch.tensor([False, True, True, False], device=DEVICE)
    grad, q, k, v, _, _, _, *rest = arguments(Shape(4, 2, 65, 70, 33, 32, SINGLE), coins)
    dq, dk, dv = (torch.full_like(t, torch.nan) for t in (q, k, v))
    launch_joint_backward(grad, q, k, v, coins, *rest, dq, dk, dv)
    assert dq[coins].isnan().all()
    assert dq[~coins].isfinite().all()
    for t in (dk, dv):
        assert t[coins].count_nonzero() == 0
        assert t[~coins].isfinite().all()
        assert t[~coins].count_nonzero() == t[~coins].numel()


def test_dq_of_the_source_is_another_launch_that_touches_nothing_else():
    coins = torch.tensor([False, True, True, False], device=DEVICE)
    args = arguments(Shape(4, 2, 65, 70, 33, 32, SINGLE), coins)
    grad, q, k, v, source_k, source_v, _, out, lse, scale = args
    without_source = [torch.full_like(t, torch.nan) for t in (q, k, v)]
    launch_backward(grad, q, k, v, None, None, coins, out, lse, scale, *without_source)
    dq, dk, dv = attention_backward(*args, True)
    assert without_source[0][coins].isnan().all()
    assert torch.equal(without_source[0][~coins], dq[~coins])
    assert torch.equal(without_source[1], dk)
    assert torch.equal(without_source[2], dv)
    # All coins true: dQ of a call that has no other pair.
    expected, _, _ = attention_backward(grad, q, source_k, source_v, None, None, None, out, lse, scale, False)
    torch.testing.assert_close(dq[coins], expected[coins])


def test_unselected_pair_is_never_read():
    shape = Shape(4, 1, 65, 65, 33, 32, SINGLE)
    x, coins = inputs_of(shape), torch.tensor([False, True, True, False], device=DEVICE)
    expected = run(x, coins, "triton", with_source_q=False)
    for t in x.kv:
        t[coins] = torch.nan
    for t in x.source_kv:
        t[~coins] = torch.nan
    for name, value in run(x, coins, "triton", with_source_q=False).items():
        assert value.isfinite().all(), name
        assert torch.equal(value, expected[name]), name


@pytest.mark.parametrize("coin", [False, "mixed"], ids=["self", "mixed"])
def test_packed_gradient_is_written_inside_and_nowhere_else(coin):
    batch, length, heads, head_dim = 2, 70, 2, 24
    coins = coins_of(batch) if coin == "mixed" else None
    grad, *inputs, out, lse, scale = arguments(
        Shape(batch, heads, length, length, 33, head_dim, SINGLE), coins
    )
    q, k, v, source_k, source_v, _ = inputs
    expected = attention_backward(grad, *inputs, out, lse, scale, True)
    # A packed projection with room between its rows and around it.
    room = torch.full((batch + 2, length + 6, 3, heads + 1, head_dim + 8), torch.nan, dtype=q.dtype)
    room = room.to(DEVICE)
    dqkv = room[1:-1, 3:-3, :, :-1, :-8]
    launch_backward(grad, *inputs, out, lse, scale, *unpack(dqkv))
    for actual, wanted in zip(unpack(dqkv), expected, strict=True):
        assert torch.equal(actual, wanted)
    dqkv.fill_(torch.nan)
    assert room.isnan().all()
    packed = torch.stack([t.transpose(1, 2) for t in (q, k, v)], 2)
    packed_gradient = packed_attention_backward(grad, packed, source_k, source_v, coins, out, lse, scale)
    assert torch.equal(packed_gradient, torch.stack([t.transpose(1, 2) for t in expected], 2))


def test_every_tensor_may_have_strides_of_its_own():
    grad, q, k, v, _, _, _, out, lse, scale = arguments(Shape(2, 3, 40, 150, 150, 24, SINGLE))
    results = []
    for orders in (
        [(0, 1, 2, 3)] * 8,
        [(2, 1, 0, 3), (1, 2, 0, 3), (0, 2, 1, 3), (2, 0, 1, 3), (1, 0, 2, 3), (0, 1, 2, 3), (2, 1, 0, 3),
         (1, 2, 0, 3)],
    ):  # fmt: skip
        tensors = [in_order(t, order) for t, order in zip((grad, q, k, v, out), orders, strict=False)]
        outputs = [
            in_order(torch.full_like(t, torch.nan), order)
            for t, order in zip((q, k, v), orders[5:], strict=True)
        ]
        launch_joint_backward(*tensors[:4], None, tensors[4], lse, scale, *outputs)
        results.append(outputs)
    for first, second in zip(*results, strict=True):
        assert first.isfinite().all()
        assert torch.equal(first, second)


def test_repeats_are_bitwise_equal():
    args = arguments(Shape(2, 2, 130, 145, 70, 40, HALF), coins_of(2))
    for first, second in zip(*(attention_backward(*args, True) for _ in range(2)), strict=True):
        assert first.isfinite().all()
        assert torch.equal(first, second)


@pytest.mark.parametrize("scale", [100.0, -100.0])
@pytest.mark.skipif(DEVICE == "cuda", reason="float32 has no row of the table on a GPU")
def test_outliers_stay_finite_and_right(scale):
    x = inputs_of(Shape(2, 1, 70, 70, 70, 32, SINGLE), scale=scale)
    coin = coins_of(2)
    actual, exact = run(x, coin, "triton"), run(x.to(torch.float64), coin, "reference")
    for name in actual:
        # A log-sum-exp of several hundred is rounded as such, and the backward starts from it.
        error = (actual[name] - exact[name]).abs().max()
        assert error < 5e-5 * exact[name].abs().max(), name


@pytest.mark.parametrize("length", [70, 197])
def test_masked_keys_far_above_the_scores_leave_no_nan(length):
    # All scores of a row near -1e4, so that a key outside, whose score is 0, would get exp2(1e4) = inf.
    dtype = HALF if DEVICE == "cuda" else SINGLE
    q = torch.full((1, 1, length, 16), 50.0, device=DEVICE, dtype=dtype, requires_grad=True)
    k = (-50 - torch.rand(1, 1, length, 16, device=DEVICE, dtype=dtype)).requires_grad_()
    v = torch.randn(1, 1, length, 16, device=DEVICE, dtype=dtype, requires_grad=True)
    out = stochca_attention(q, (k, v), None, False, impl="triton")
    for t in torch.autograd.grad(out.sum(), (q, k, v)):
        assert t.isfinite().all()


def test_an_infinite_key_that_no_query_reads_spoils_nothing():
    assert_an_infinite_key_that_no_query_reads_spoils_nothing()


@pytest.mark.parametrize("shape", [(0, 2, 17, 17), (2, 2, 0, 17)], ids=["B0", "Nq0"])
def test_without_queries_the_gradients_of_the_keys_are_zero(shape):
    batch, heads, len_q, len_kv = shape
    x = make_inputs(batch, heads, len_q, len_kv, len_kv, 32, device=DEVICE, dtype=HALF)
    leaves = [t.detach().requires_grad_() for t in (x.q, *x.kv)]
    coins = torch.zeros(batch, dtype=torch.bool, device=DEVICE)
    out = stochca_attention(leaves[0], tuple(leaves[1:]), x.source_kv, coins, impl="triton")
    for t, grad in zip(leaves, torch.autograd.grad(out.sum(), leaves), strict=True):
        assert torch.equal(grad, torch.zeros_like(t))


def test_cross_attention_launches_no_kernel_for_dk_and_dv(monkeypatch):
    monkeypatch.setattr(backward, "launch_joint_backward", None)
    results = run(inputs_of(SHAPES[1]), True, "triton")
    assert results["dk"].count_nonzero() == 0
    assert results["dv"].count_nonzero() == 0


@pytest.mark.parametrize(("len_kv", "head_dim"), [(257, 16), (64, 72)], ids=["N257", "D72"])
def test_more_keys_or_wider_heads_take_the_split_kernels(monkeypatch, len_kv, head_dim):
    monkeypatch.undo()
    monkeypatch.setattr(backward, "launch_joint_backward", None)
    results = run(inputs_of(Shape(1, 1, 20, len_kv, len_kv, head_dim, HALF)), False, "triton")
    assert all(t.isfinite().all() for t in results.values())


def test_one_program_and_split_kernels_agree(monkeypatch):
    args = arguments(Shape(2, 2, 65, 150, 33, 40, HALF), coins_of(2))
    joint = attention_backward(*args, True)
    monkeypatch.undo()
    monkeypatch.setattr(backward, "has_joint_backward", lambda q, len_kv: False)
    monkeypatch.setattr(backward, "launch_joint_backward", None)
    for actual, expected in zip(joint, attention_backward(*args, True), strict=True):
        torch.testing.assert_close(actual, expected, rtol=2e-3, atol=2e-3)


def test_only_hopper_has_rows_for_it():
    for gpu in ("sm_80", "sm_89", "sm_90", "sm_100", "sm_120", "gfx942"):
        assert bool(plans("dqkv", gpu, "half", 64, 256)) == (gpu == "sm_90")
        assert plans("dqkv", gpu, "ieee", 64, 256) == ()
    assert plans("dqkv", "sm_90", "half", 64, 257) == plans("dqkv", "sm_90", "half", 72, 64) == ()
