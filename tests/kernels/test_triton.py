"""The Triton kernels against the definition, in the interpreter where there is no GPU."""

from itertools import cycle
from typing import NamedTuple

import pytest
import torch

pytest.importorskip("triton")

from stochca_kernels import backward, forward, stochca_attention
from stochca_kernels.reference import attend
from stochca_kernels.testing import Inputs, assert_close_to_exact, make_inputs

pytestmark = [
    # Triton's interpreter reads the bounds of a loop so.
    pytest.mark.filterwarnings("ignore:Conversion of an array with ndim > 0 to a scalar"),
    # What lies outside may overflow, and numpy says so; none of it is kept.
    pytest.mark.filterwarnings("ignore:(overflow|invalid value) encountered"),
]

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
NAMES = {torch.float32: "fp32", torch.float16: "fp16"}
LENGTHS = (1, 16, 17, 64, 65, 127, 128, 196, 197, 208, 209, 257)


class Shape(NamedTuple):
    batch: int
    heads: int
    len_q: int
    len_kv: int
    len_source: int
    head_dim: int
    dtype: torch.dtype

    def __str__(self):
        batch, heads, len_q, len_kv, len_source, head_dim, dtype = self
        lengths = f"N{len_kv}" if len_q == len_kv == len_source else f"Nq{len_q}-N{len_kv}-Ns{len_source}"
        return f"B{batch}-H{heads}-{lengths}-D{head_dim}-{NAMES[dtype]}"


# Every length with one head size, every head size with one length, the dtypes in turn; lengths that differ.
SHAPES = [
    *(Shape(2, 1, n, n, n, 32, dtype) for n, dtype in zip(LENGTHS, cycle(NAMES), strict=False)),
    *(Shape(2, 1, 65, 65, 65, d, t) for d, t in zip((16, 64, 72, 80, 88, 128), cycle(NAMES), strict=False)),
    *(Shape(1, 2, 197, 197, 197, d, torch.float16) for d in (64, 80)),
    *(Shape(1, 1, n, n, n, 16, torch.float32) for n in (272, 273, 401)),
    Shape(1, 1, 70, 602, 602, 16, torch.float16),
    Shape(2, 1, 70, 257, 257, 64, torch.float16),
    Shape(2, 3, 1, 197, 65, 64, torch.float16),
    Shape(2, 3, 65, 17, 130, 40, torch.float32),
    Shape(2, 1, 130, 1, 64, 24, torch.float32),
]
shapes = pytest.mark.parametrize("shape", SHAPES, ids=str)


def inside_nan(x: torch.Tensor) -> torch.Tensor:
    """The same values and strides, in the middle of a buffer that is NaN everywhere else."""
    span = sum((n - 1) * stride for n, stride in zip(x.shape, x.stride(), strict=True)) + 1
    margin = 64 * max(x.stride())
    buffer = torch.full((span + 2 * margin,), float("nan"), dtype=x.dtype, device=x.device)
    view = buffer.as_strided(x.shape, x.stride(), margin)
    view.copy_(x)
    return view


@pytest.fixture(autouse=True)
def poisoned_outputs(monkeypatch):
    """Everything that the launchers allocate is NaN until a kernel writes it."""

    def poisoned(new):
        return lambda *args, **kwargs: new(*args, **kwargs).fill_(float("nan"))

    for name in ("new_empty", "new_empty_strided"):
        monkeypatch.setattr(torch.Tensor, name, poisoned(getattr(torch.Tensor, name)))
    monkeypatch.setattr(torch, "empty_like", poisoned(torch.empty_like))


@pytest.fixture(autouse=True)
def split_backward(monkeypatch):
    """One kernel for dQ and one for dK and dV at all lengths: `test_joint.py` has the facts of the other."""
    monkeypatch.setattr(backward, "has_joint_backward", lambda q, len_kv: False)


def inputs_of(shape: Shape, *, scale: float = 1.0) -> Inputs:
    x = make_inputs(*shape[:6], dtype=shape.dtype, device=DEVICE)
    q, kv, source_kv, source_q = x
    return Inputs(
        inside_nan(q * scale),
        tuple(map(inside_nan, kv)),
        tuple(map(inside_nan, source_kv)),
        inside_nan(source_q),
    )


def run(x: Inputs, coin, impl: str, *, with_source_q: bool = True) -> dict[str, torch.Tensor]:
    """Outputs and gradients by name."""
    x = Inputs(x.q.detach(), tuple(t.detach() for t in x.kv), x.source_kv, x.source_q)
    leaves = [x.q.requires_grad_(), *(t.requires_grad_() for t in x.kv)]
    source_q = x.source_q if with_source_q else None
    out = stochca_attention(x.q, x.kv, x.source_kv, coin, source_q=source_q, impl=impl)
    results = {}
    if with_source_q:
        out, results["source_out"] = out
    generator = torch.Generator().manual_seed(1)
    grad = torch.randn(out.shape, generator=generator).to(out.device, torch.float16).to(out.dtype)
    grads = torch.autograd.grad(out, leaves, inside_nan(grad))
    return {**results, "out": out.detach(), **dict(zip(("dq", "dk", "dv"), grads, strict=True))}


def coins_of(batch: int) -> torch.Tensor:
    return torch.arange(batch, device=DEVICE) % 2 == 1


@shapes
@pytest.mark.parametrize("coin", [False, True, "mixed"], ids=["self", "cross", "mixed"])
def test_error_is_at_most_twice_that_of_eager_torch(shape, coin):
    coin = coins_of(shape.batch) if coin == "mixed" else coin
    x = inputs_of(shape)
    actual = run(x, coin, "triton")
    eager = run(x, coin, "reference")
    exact = run(x.to(torch.float64), coin, "reference")
    for name in actual:
        if exact[name].abs().max() < 1e-12:
            # With one key the scores have no gradient: two equal sums cancel, up to their rounding.
            assert actual[name].abs().max() < 1e-5, name
        else:
            # The largest of all errors is noisy where it adds up over two more products.
            factor = 3.0 if name in ("dq", "dk", "dv") else 2.0
            assert_close_to_exact(actual[name], eager[name], exact[name], factor=factor)
            assert_close_to_exact(actual[name], eager[name], exact[name], measure="rms")


@shapes
def test_log_sum_exp_is_base_2_in_float32_and_of_the_selected_pair(shape):
    x, coins = inputs_of(shape), coins_of(shape.batch)
    scale = shape.head_dim**-0.5
    _, lse, _ = forward.attention_forward(x.q, *x.kv, *x.source_kv, coins, None, scale, True)
    assert lse.dtype == torch.float32

    def expected(inputs):
        own, source = (attend(inputs.q, *pair, scale)[1] for pair in (inputs.kv, inputs.source_kv))
        return torch.where(coins[:, None, None], source, own)

    assert_close_to_exact(lse, expected(x).float(), expected(x.to(torch.float64)))


def test_log_sum_exp_is_stored_only_where_a_backward_needs_it(monkeypatch):
    asked = []

    class Launcher:
        def __getitem__(self, grid):
            return lambda *args, HAS_LSE, **kwargs: asked.append(HAS_LSE)

    monkeypatch.setattr(forward, "_attn_fwd_kernel", Launcher())
    x = inputs_of(SHAPES[0])
    stochca_attention(x.q, x.kv, None, False, impl="triton")
    stochca_attention(x.q.requires_grad_(), x.kv, None, False, impl="triton")
    with torch.no_grad():
        stochca_attention(x.q, x.kv, None, False, impl="triton")
    assert asked == [False, True, False]


def test_cross_attention_launches_no_kernel_for_dk_and_dv(monkeypatch):
    monkeypatch.setattr(backward, "_attn_bwd_dkdv_kernel", None)
    results = run(inputs_of(SHAPES[0]), True, "triton")
    assert results["dk"].count_nonzero() == 0
    assert results["dv"].count_nonzero() == 0


def test_unselected_pair_is_never_read():
    shape = Shape(4, 1, 65, 65, 33, 32, torch.float32)
    x, coins = inputs_of(shape), torch.tensor([False, True, True, False], device=DEVICE)
    expected = run(x, coins, "triton", with_source_q=False)
    for t in x.kv:
        t[coins] = float("nan")
    for t in x.source_kv:
        t[~coins] = float("nan")
    for name, value in run(x, coins, "triton", with_source_q=False).items():
        assert torch.equal(value, expected[name]), name
        assert value.isfinite().all(), name


def test_samples_that_read_the_source_get_exactly_zero_dk_and_dv():
    coins = torch.tensor([False, True, True, False], device=DEVICE)
    results = run(inputs_of(Shape(4, 2, 65, 65, 65, 32, torch.float32)), coins, "triton")
    for name in ("dk", "dv"):
        assert results[name][coins].count_nonzero() == 0
        assert results[name][~coins].count_nonzero() == results[name][~coins].numel()


@pytest.mark.parametrize("scale", [100.0, -100.0])
def test_outliers_stay_finite_and_right(scale):
    x = inputs_of(Shape(2, 1, 70, 70, 70, 32, torch.float32), scale=scale)
    coin = coins_of(2)
    actual, exact = run(x, coin, "triton"), run(x.to(torch.float64), coin, "reference")
    for name in actual:
        # A log-sum-exp of several hundred is rounded as such, and the backward starts from it.
        error = (actual[name] - exact[name]).abs().max()
        assert error < 5e-5 * exact[name].abs().max(), name


def test_logits_far_below_zero_stay_finite():
    # All scores of a row near -1e4: a softmax without its maximum gives 0 / 0, an unmasked backward inf * 0.
    q = torch.full((1, 1, 70, 16), 50.0, device=DEVICE, requires_grad=True)
    k = (-50 - torch.rand(1, 1, 70, 16, device=DEVICE)).requires_grad_()
    v = torch.randn(1, 1, 70, 16, device=DEVICE, requires_grad=True)
    out = stochca_attention(q, (k, v), None, False, impl="triton")
    for t in (out, *torch.autograd.grad(out.sum(), (q, k, v))):
        assert t.isfinite().all()


@pytest.mark.filterwarnings("ignore:All-NaN slice encountered")  # in rows outside, zero times infinity
def test_scores_of_minus_infinity_in_a_whole_tile_are_no_nan():
    x = make_inputs(1, 2, 20, 300, 1, 16, device=DEVICE)
    q, k, v = x.q.abs(), *x.kv
    k[:, :, :200] = float("-inf")
    out = stochca_attention(q, (k, v), None, False, impl="triton")
    torch.testing.assert_close(out, stochca_attention(q, (k, v), None, False, impl="reference"))
    k[:] = float("-inf")
    assert stochca_attention(q, (k, v), None, False, impl="triton").isnan().all()


def assert_an_infinite_key_that_no_query_reads_spoils_nothing():
    """Five of sixteen rows of a tile are queries: what stands in the others must not meet the infinity."""
    x = make_inputs(1, 2, 5, 65, 1, 16, device=DEVICE, dtype=torch.float16)
    q, k, v = -x.q.abs(), *x.kv
    k[0, 1, 33, 7] = float("inf")
    leaves = [t.requires_grad_() for t in (q, k, v)]
    grads = {}
    for impl in ("triton", "reference"):
        out = stochca_attention(q, (k, v), None, False, impl=impl)
        grads[impl] = torch.autograd.grad(out.sum(), leaves)[1:]
    for actual, expected in zip(grads["triton"], grads["reference"], strict=True):
        assert expected.isfinite().all()
        torch.testing.assert_close(actual, expected, atol=2e-3, rtol=2e-3)


def test_an_infinite_key_that_no_query_reads_spoils_nothing():
    assert_an_infinite_key_that_no_query_reads_spoils_nothing()


def test_repeats_are_bitwise_equal():
    x = inputs_of(Shape(2, 2, 130, 130, 70, 40, torch.float16))
    first, second = (run(x, coins_of(2), "triton") for _ in range(2))
    for name in first:
        assert torch.equal(first[name], second[name]), name


def test_strides_of_any_order_need_no_copy():
    # [N, H, B, D] in memory, a gradient that is one number expanded, and another layout for each tensor
    def strided(length, order, seed):
        x = torch.randn(2, 3, length, 24, generator=torch.Generator().manual_seed(seed)).to(DEVICE)
        back = [order.index(i) for i in range(4)]
        return inside_nan(x.permute(order).contiguous().permute(back))

    x = Inputs(
        strided(40, (2, 1, 0, 3), 0),
        (strided(33, (1, 2, 0, 3), 1), strided(33, (0, 2, 1, 3), 2)),
        (strided(50, (2, 0, 1, 3), 3), strided(50, (0, 1, 2, 3), 4)),
        strided(20, (1, 0, 2, 3), 5),
    )
    for coin in (False, True, coins_of(2)):
        actual, expected = run(x, coin, "triton"), run(x, coin, "reference")
        for name in actual:
            torch.testing.assert_close(actual[name], expected[name], msg=lambda m, name=name: f"{name}: {m}")


@pytest.mark.parametrize("shape", [(0, 2, 17, 17), (2, 2, 0, 17)], ids=["B0", "Nq0"])
def test_nothing_to_attend_with_launches_nothing_and_gives_zero_gradients(shape):
    batch, heads, len_q, len_kv = shape
    x = make_inputs(batch, heads, len_q, len_kv, len_kv, 32, device=DEVICE)
    q, k, v = (t.detach().requires_grad_() for t in (x.q, *x.kv))
    coins = torch.zeros(batch, dtype=torch.bool, device=DEVICE)
    out = stochca_attention(q, (k, v), x.source_kv, coins, impl="triton")
    assert out.shape == q.shape
    for t, grad in zip((q, k, v), torch.autograd.grad(out.sum(), (q, k, v)), strict=True):
        assert torch.equal(grad, torch.zeros_like(t))


def arguments(dtype=torch.float32):
    x = make_inputs(2, 2, 20, 20, 18, 16, dtype=dtype, device=DEVICE)
    return (x.q, *x.kv, *x.source_kv, coins_of(2), x.source_q, 0.25)


@pytest.mark.usefixtures("unpoisoned")
@pytest.mark.parametrize("variant", ["self", "coins", "source_q"])
def test_operators_satisfy_opcheck(variant):
    import stochca_kernels.autograd  # noqa: F401

    q, k, v, source_k, source_v, coins, source_q, scale = arguments()
    if variant == "self":
        source_k = source_v = coins = source_q = None
    if variant == "coins":
        source_q = None
    args = (q, k, v, source_k, source_v, coins, source_q, scale, True)
    torch.library.opcheck(torch.ops.stochca.attention_forward, args)
    out, lse, _ = torch.ops.stochca.attention_forward(*args)
    for needs_dkdv in (False, True):
        torch.library.opcheck(
            torch.ops.stochca.attention_backward,
            (out, q, k, v, source_k, source_v, coins, out, lse, scale, needs_dkdv),
        )


@pytest.fixture
def unpoisoned(monkeypatch, poisoned_outputs):
    monkeypatch.undo()


@pytest.mark.usefixtures("unpoisoned")
@pytest.mark.filterwarnings("ignore:.*autograd.function.Function.* should not be instantiated")
def test_compiles_as_one_graph_once_for_all_batch_sizes():
    import torch._dynamo.testing

    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")

    @torch.compile(fullgraph=True, backend=counter)
    def compiled(q, kv, source_kv, coins):
        return stochca_attention(q * 2, kv, source_kv, coins, impl="triton")

    for batch in (2, 3, 5):
        x = make_inputs(batch, 2, 20, 20, 20, 16, device=DEVICE)
        coins = coins_of(batch)
        results = []
        for function in (compiled, compiled._torchdynamo_orig_callable):
            leaves = [t.detach().requires_grad_() for t in (x.q, *x.kv)]
            out = function(leaves[0], tuple(leaves[1:]), x.source_kv, coins)
            results.append((out, *torch.autograd.grad(out.square().sum(), leaves)))
        for actual, expected in zip(*results, strict=True):
            torch.testing.assert_close(actual, expected)
    # The second batch size makes the batch symbolic, the third must not compile again.
    assert counter.frame_count == 2


@pytest.mark.usefixtures("unpoisoned")
@pytest.mark.filterwarnings("ignore:.*autograd.function.Function.* should not be instantiated")
def test_compiles_with_every_size_unknown():
    @torch.compile(fullgraph=True, backend="aot_eager", dynamic=True)
    def compiled(q, kv, source_kv, coins):
        return stochca_attention(q, kv, source_kv, coins, impl="triton")

    for batch, length, head_dim in ((2, 20, 16), (3, 33, 24)):
        x = make_inputs(batch, 2, length, length, 25, head_dim, device=DEVICE)
        arguments = x.q.detach().requires_grad_(), x.kv, x.source_kv, coins_of(batch)
        actual = compiled(*arguments)
        torch.testing.assert_close(actual, stochca_attention(*arguments, impl="reference"))
        actual.sum().backward()


def test_double_backward_is_refused():
    q, k, v, *_ = arguments()
    q.requires_grad_()
    out = stochca_attention(q, (k, v), None, False, impl="triton")
    with pytest.raises(RuntimeError, match="no second derivative"):
        torch.autograd.grad(out.sum(), q, create_graph=True)


def test_functorch_is_refused():
    q, k, v, *_ = arguments()
    with pytest.raises(RuntimeError, match=r"torch\.func"):
        torch.func.vmap(lambda q, k, v: stochca_attention(q, (k, v), None, False, impl="triton"))(
            *(t[None] for t in (q, k, v))
        )
    with pytest.raises(RuntimeError, match=r"torch\.func"):
        torch.func.grad(lambda q: stochca_attention(q, (k, v), None, False, impl="triton").sum())(q)


@pytest.mark.filterwarnings("ignore:.*torch.jit.*:DeprecationWarning")  # what torch imports for it
def test_forward_mode_differentiation_is_refused():
    q, k, v, *_ = arguments()
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(q, torch.ones_like(q))
        with pytest.raises(RuntimeError, match="no forward-mode differentiation"):
            stochca_attention(dual, (k, v), None, False, impl="triton")
