"""Few rows of queries that attend to tokens, without a key or a value, against the definition."""

from typing import NamedTuple

import pytest
import torch

pytest.importorskip("triton")

from stochca_kernels import tokens
from stochca_kernels.few_rows import attention_tokens
from stochca_kernels.projection import Projection
from stochca_kernels.reference import attention_reference
from stochca_kernels.testing import assert_close_to_exact
from stochca_kernels.tiles import Tiles, channel_chunks

pytestmark = [
    # Triton's interpreter reads the bounds of a loop so.
    pytest.mark.filterwarnings("ignore:Conversion of an array with ndim > 0 to a scalar"),
    # What lies outside may overflow, and numpy says so; none of it is kept.
    pytest.mark.filterwarnings("ignore:(overflow|invalid value|divide by zero) encountered"),
]

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
NAMES = {torch.float32: "fp32", torch.float16: "fp16"}


class Shape(NamedTuple):
    batch: int
    heads: int
    len_q: int
    len_x: int
    len_source: int
    head_dim: int
    channels: int
    dtype: torch.dtype

    def __str__(self):
        batch, heads, len_q, len_x, len_source, head_dim, channels, dtype = self
        lengths = f"N{len_x}" if len_x == len_source else f"N{len_x}-Ns{len_source}"
        return f"B{batch}-H{heads}-Nq{len_q}-{lengths}-D{head_dim}-C{channels}-{NAMES[dtype]}"


FP16, FP32 = torch.float16, torch.float32
# Lengths that no tile divides, channels that are no power of two or no multiple of 16, rows beyond one block.
SHAPES = [
    Shape(2, 3, 1, 197, 197, 32, 96, FP32),
    Shape(2, 3, 1, 197, 197, 64, 192, FP16),
    Shape(2, 12, 1, 17, 50, 64, 768, FP16),
    Shape(2, 2, 3, 1, 17, 16, 32, FP32),
    Shape(2, 2, 3, 272, 1, 16, 40, FP16),
    Shape(2, 5, 7, 65, 273, 16, 100, FP32),
    Shape(2, 2, 1, 785, 785, 16, 48, FP32),
]
shapes = pytest.mark.parametrize("shape", SHAPES, ids=str)
SMALL = Shape(4, 3, 2, 65, 33, 16, 48, FP32)


class Inputs(NamedTuple):
    q: torch.Tensor
    kv: Projection
    source_kv: Projection

    def map(self, function) -> "Inputs":
        return Inputs(
            function(self.q),
            *(Projection(*(t if t is None else function(t) for t in side)) for side in self[1:]),
        )


def inside_nan(x: torch.Tensor) -> torch.Tensor:
    """The same values, in the middle of a buffer that is NaN everywhere else."""
    rows = x.flatten(0, -2) if x.ndim > 1 else x[None]
    buffer = torch.full(
        (rows.shape[0] + 200, rows.shape[1] + 16), float("nan"), dtype=x.dtype, device=x.device
    )
    view = buffer[100:-100, 8:-8]
    view.copy_(rows)
    return view.unflatten(0, x.shape[:-1]) if x.ndim > 1 else view[0]


@pytest.fixture(autouse=True)
def poisoned_outputs(monkeypatch):
    """Everything that the launchers allocate is NaN until a kernel writes it."""
    new_empty = torch.Tensor.new_empty

    def poisoned(self, *args, **kwargs):
        return new_empty(self, *args, **kwargs).fill_(float("nan"))

    monkeypatch.setattr(torch.Tensor, "new_empty", poisoned)


@pytest.fixture
def unpoisoned(monkeypatch, poisoned_outputs):
    monkeypatch.undo()


def inputs_of(shape: Shape, *, bias: bool = True, rstd: bool = False, seed: int = 0) -> Inputs:
    batch, heads, len_q, len_x, len_source, head_dim, channels, dtype = shape
    generator = torch.Generator().manual_seed(seed)

    def normal(*size, std=1.0):
        return (torch.randn(*size, generator=generator) * std).to(DEVICE, dtype)

    def side(length):
        packed = 2 * heads * head_dim
        return Projection(
            normal(batch, length, channels),
            normal(packed, channels, std=channels**-0.5),
            normal(packed) if bias else None,
        )

    q, kv, source_kv = normal(batch, heads, len_q, head_dim), side(len_x), side(len_source)
    if rstd:
        factor = torch.rand(batch, len_source, generator=generator) + 0.5
        source_kv = source_kv._replace(rstd=factor.to(DEVICE))
    return Inputs(q, kv, source_kv).map(inside_nan)


def coins_of(batch: int) -> torch.Tensor:
    return torch.arange(batch, device=DEVICE) % 2 == 1


def reference(q, kv, source_kv, coin, scale):
    if source_kv is not None and source_kv.rstd is not None:
        scaled = (source_kv.x * source_kv.rstd[..., None]).to(q.dtype)
        source_kv = source_kv._replace(x=scaled, rstd=None)
    return attention_reference(q, kv, source_kv, coin, None, scale)[0]


def run(x: Inputs, coin, function, scale: float | None = None) -> dict[str, torch.Tensor]:
    """The output and all gradients by name."""
    scale = x.q.shape[-1] ** -0.5 if scale is None else scale
    q = x.q.detach().requires_grad_()
    kv = Projection(*(t if t is None else t.detach().requires_grad_() for t in x.kv))
    names = ["dq"] if coin is True else ["dq", "dx", "dweight", "dbias"][: 4 if kv.bias is not None else 3]
    leaves = [q, *(t for t in kv if t is not None)][: len(names)]
    out = function(q, None if coin is True else kv, None if coin is False else x.source_kv, coin, scale)
    generator = torch.Generator().manual_seed(1)
    grad = torch.randn(out.shape, generator=generator).to(out.device, torch.float16).to(out.dtype)
    grads = torch.autograd.grad(out, leaves, inside_nan(grad))
    return {"out": out.detach(), **dict(zip(names, grads, strict=True))}


def assert_like_eager(actual, eager, exact):
    for name in actual:
        if exact[name].abs().max() < 1e-12:
            # With one token the scores have no gradient: two equal sums cancel, up to their rounding.
            assert actual[name].abs().max() < 1e-2, name
        else:
            # The largest of all errors is noisy where it adds up over two more products.
            factor = 2.0 if name == "out" else 3.0
            assert_close_to_exact(actual[name], eager[name], exact[name], factor=factor)
            assert_close_to_exact(actual[name], eager[name], exact[name], measure="rms")


@shapes
@pytest.mark.parametrize("coin", [False, True, "mixed"], ids=["self", "cross", "mixed"])
def test_error_is_at_most_twice_that_of_eager_torch(shape, coin):
    coin = coins_of(shape.batch) if coin == "mixed" else coin
    x = inputs_of(shape)
    exact = run(x.map(torch.Tensor.double), coin, reference)
    assert_like_eager(run(x, coin, attention_tokens), run(x, coin, reference), exact)


@pytest.mark.parametrize("coin", [True, "mixed"], ids=["cross", "mixed"])
def test_factor_of_each_token_is_as_if_the_tokens_were_scaled(coin):
    shape = Shape(3, 2, 2, 40, 70, 16, 48, FP32)
    coin = coins_of(3) if coin == "mixed" else coin
    x = inputs_of(shape, rstd=True)
    exact = run(x.map(torch.Tensor.double), coin, reference)
    assert_like_eager(run(x, coin, attention_tokens), run(x, coin, reference), exact)


def test_tokens_with_a_factor_that_need_a_gradient_are_refused():
    x = inputs_of(SMALL, rstd=True)
    scaled = x.source_kv._replace(x=x.source_kv.x.detach().requires_grad_())
    with pytest.raises(ValueError, match="constant"):
        attention_tokens(x.q, scaled, None, False, 0.25)


@pytest.mark.parametrize("dtype", NAMES, ids=NAMES.get)
def test_splits_of_the_tokens_change_nothing_but_the_rounding(monkeypatch, dtype):
    # 7 splits of 33 tokens hold 5 each and the last 3, those of 17 leave one of them empty.
    small = SMALL._replace(batch=2, heads=1, dtype=dtype)
    for shape in (small, small._replace(len_x=17)):
        x, coins = inputs_of(shape, rstd=True), coins_of(shape.batch)
        whole = run(x, coins, attention_tokens)
        with monkeypatch.context() as patch:
            patch.setattr(tokens, "token_splits", lambda *_: 7)
            split = run(x, coins, attention_tokens)
        assert_like_eager(split, whole, run(x.map(torch.Tensor.double), coins, reference))


@pytest.mark.parametrize("dtype", NAMES, ids=NAMES.get)
def test_tiles_that_do_not_fit_on_chip_change_nothing_but_the_rounding(monkeypatch, dtype):
    # Channels in chunks of 128, blocks of 16 of the 21 rows.
    shape = Shape(2, 3, 7, 40, 33, 16, 200, dtype)
    streaming = (Tiles(16, 16, 8, 1, "test"),)
    monkeypatch.setattr(tokens, "choose_tiles", lambda *_: streaming)
    for coin in (False, True, coins_of(2)):
        x = inputs_of(shape, rstd=True)
        exact = run(x.map(torch.Tensor.double), coin, reference)
        assert_like_eager(run(x, coin, attention_tokens), run(x, coin, reference), exact)


def test_log_sum_exp_is_base_2_in_float32_whatever_the_splits(monkeypatch):
    x = inputs_of(SMALL)
    queries = inside_nan(torch.randn(4, 5, 48, generator=torch.Generator().manual_seed(2)).to(DEVICE))
    expected = (queries @ x.kv.x.transpose(1, 2) * 0.3).logsumexp(-1) / torch.log(torch.tensor(2.0))
    for splits in (1, 3):
        monkeypatch.setattr(tokens, "token_splits", lambda *_, splits=splits: splits)
        _, lse = tokens.tokens_forward(queries, x.kv.x, None, None, None, None, 0.3)
        assert lse.dtype == torch.float32
        torch.testing.assert_close(lse, expected)


def test_unselected_tokens_are_never_read():
    x, coins = inputs_of(SMALL, rstd=True), torch.tensor([False, True, True, False], device=DEVICE)
    expected = run(x, coins, attention_tokens)
    x.kv.x[coins] = float("nan")
    x.source_kv.x[~coins] = float("nan")
    x.source_kv.rstd[~coins] = float("nan")
    for name, value in run(x, coins, attention_tokens).items():
        assert torch.equal(value, expected[name]), name
        assert value.isfinite().all(), name


def test_nan_in_a_weight_that_no_sample_selects_reaches_nothing_else():
    for coin in (False, True):
        x, coins = inputs_of(SMALL), torch.full((4,), coin, device=DEVICE)
        expected = run(x, coins, attention_tokens)
        (x.kv if coin else x.source_kv).weight.fill_(float("nan"))
        actual = run(x, coins, attention_tokens)
        for name in ("out", "dq", "dx", "dweight", "dbias"):
            assert torch.equal(actual[name], expected[name]), name
            assert actual[name].isfinite().all(), name


def test_samples_that_read_the_source_get_exactly_zero_gradients_of_their_own():
    coins = torch.tensor([False, True, True, False], device=DEVICE)
    dx = run(inputs_of(SMALL), coins, attention_tokens)["dx"]
    assert dx[coins].count_nonzero() == 0
    assert dx[~coins].count_nonzero() == dx[~coins].numel()
    results = run(inputs_of(SMALL), torch.ones_like(coins), attention_tokens)
    for name in ("dx", "dweight", "dbias"):
        assert results[name].count_nonzero() == 0, name


def test_key_bias_has_a_gradient_of_exactly_zero():
    dbias = run(inputs_of(SMALL), False, attention_tokens)["dbias"]
    keys, values = dbias.chunk(2)
    assert keys.count_nonzero() == 0
    assert values.count_nonzero() == values.numel()


def test_projection_without_a_bias():
    x = inputs_of(SMALL, bias=False)
    for coin in (False, True, coins_of(4)):
        actual, expected = run(x, coin, attention_tokens), run(x, coin, reference)
        for name in actual:
            torch.testing.assert_close(actual[name], expected[name])


def test_tokens_that_need_no_gradient_get_none(monkeypatch):
    asked = []
    backward = torch.ops.stochca.tokens_backward

    def spy(*args):
        asked.append(args[-1])
        return backward(*args)

    monkeypatch.setattr(torch.ops.stochca, "tokens_backward", spy)
    x = inputs_of(SMALL)
    for needs_dx in (False, True):
        own = x.kv._replace(x=x.kv.x.detach().requires_grad_(needs_dx))
        attention_tokens(x.q.detach().requires_grad_(), own, None, False, 0.25).sum().backward()
        assert (own.x.grad is not None) == needs_dx
    assert asked == [False, True]


@pytest.mark.parametrize("scale", [100.0, -100.0])
def test_outliers_stay_finite_and_right(scale):
    x, coins = inputs_of(SMALL), coins_of(4)
    actual = run(x, coins, attention_tokens, scale / 4)
    exact = run(x.map(torch.Tensor.double), coins, reference, scale / 4)
    for name in actual:
        # A log-sum-exp of several hundred is rounded as such, and the backward starts from it.
        assert (actual[name] - exact[name]).abs().max() < 5e-4 * exact[name].abs().max(), name


def test_logits_far_below_zero_stay_finite():
    # All scores of a row near -1e4: a softmax without its maximum gives 0 / 0, an unmasked backward inf * 0.
    queries = torch.full((1, 2, 16), 50.0, device=DEVICE)
    x = -50 - torch.rand(1, 70, 16, device=DEVICE)
    mixed, lse = tokens.tokens_forward(queries, x, None, None, None, None, 0.25)
    grads = tokens.tokens_backward(mixed, queries, x, None, None, None, None, mixed, lse, 0.25, True)
    for t in (mixed, lse, *grads):
        assert t.isfinite().all()


def test_repeats_are_bitwise_equal(monkeypatch):
    monkeypatch.setattr(tokens, "token_splits", lambda *_: 3)
    x = inputs_of(Shape(2, 5, 7, 65, 130, 16, 48, FP16))
    first, second = (run(x, coins_of(2), attention_tokens) for _ in range(2))
    for name in first:
        assert torch.equal(first[name], second[name]), name


@pytest.mark.skipif(DEVICE == "cuda", reason="only the interpreter tells what it loads")
def test_every_token_is_loaded_once(monkeypatch):
    from triton.runtime.interpreter import interpreter_builder

    addresses = []
    load = interpreter_builder.create_masked_load

    def recorded(ptrs, mask, *args):
        addresses.append(torch.from_numpy(ptrs.data[mask.data].astype("int64")))
        return load(ptrs, mask, *args)

    x = torch.randn(2, 130, 96)
    queries = torch.randn(2, 12, 96)
    monkeypatch.setattr(interpreter_builder, "create_masked_load", recorded)
    mixed, lse = tokens.tokens_forward(queries, x, None, None, None, None, 1.0)
    forward, addresses = torch.cat(addresses), []
    tokens.tokens_backward(mixed, queries, x, None, None, None, None, mixed, lse, 1.0, True)
    for loaded in (forward, torch.cat(addresses)):
        inside = loaded[(loaded >= x.data_ptr()) & (loaded < x.data_ptr() + 4 * x.numel())]
        assert len(inside) == len(inside.unique()) == x.numel()


@pytest.mark.parametrize("shape", [(0, 2, 1), (2, 2, 0)], ids=["B0", "Nq0"])
def test_nothing_to_attend_with_launches_nothing_and_gives_zero_gradients(shape):
    x = inputs_of(SMALL)
    batch, heads, len_q = shape
    q = torch.zeros(batch, heads, len_q, 24, device=DEVICE, requires_grad=True)
    own = x.kv._replace(x=x.kv.x[:batch].detach().requires_grad_())
    out = attention_tokens(q, own, None, False, 0.25)
    assert out.shape == q.shape
    for t, grad in zip((q, own.x), torch.autograd.grad(out.sum(), (q, own.x)), strict=True):
        assert torch.equal(grad, torch.zeros_like(t))


def test_channels_are_cut_exactly():
    for channels in (192, 384, 768, 1024, 1152, 1280, 1408):
        assert sum(channel_chunks(channels)) == channels
    assert channel_chunks(100) == (64, 32, 16)
    assert channel_chunks(1) == (16,)


@pytest.mark.usefixtures("unpoisoned")
@pytest.mark.parametrize("has_coins", [False, True], ids=["self", "coins"])
def test_operators_satisfy_opcheck(has_coins):
    x = inputs_of(SMALL, rstd=True)
    queries = torch.randn(4, 5, 48, device=DEVICE)
    rest = (x.source_kv.x, x.source_kv.rstd, coins_of(4)) if has_coins else (None, None, None)
    sides = (queries, x.kv.x, None, *rest)
    torch.library.opcheck(torch.ops.stochca.tokens_forward, (*sides, 0.25))
    mixed, lse = torch.ops.stochca.tokens_forward(*sides, 0.25)
    for needs_dx in (False, True):
        args = (mixed, *sides, mixed, lse, 0.25, needs_dx)
        torch.library.opcheck(torch.ops.stochca.tokens_backward, args)


@pytest.mark.usefixtures("unpoisoned")
@pytest.mark.filterwarnings("ignore:.*autograd.function.Function.* should not be instantiated")
def test_compiles_as_one_graph_once_for_all_batch_sizes():
    import torch._dynamo.testing

    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")

    @torch.compile(fullgraph=True, backend=counter)
    def compiled(q, kv, source_kv, coin, scale):
        return attention_tokens(q * 1, kv, source_kv, coin, scale)

    for batch in (2, 3, 5):
        x = inputs_of(SMALL._replace(batch=batch))
        actual, expected = (run(x, coins_of(batch), f) for f in (compiled, attention_tokens))
        for name in actual:
            torch.testing.assert_close(actual[name], expected[name])
    # The second batch size makes the batch symbolic, the third must not compile again.
    assert counter.frame_count == 2


def test_double_backward_is_refused():
    x = inputs_of(SMALL)
    q = x.q.detach().requires_grad_()
    with pytest.raises(RuntimeError, match="no second derivative"):
        torch.autograd.grad(attention_tokens(q, x.kv, None, False, 0.25).sum(), q, create_graph=True)


def test_functorch_is_refused():
    x = inputs_of(SMALL)
    with pytest.raises(RuntimeError, match=r"torch\.func"):
        torch.func.grad(lambda q: attention_tokens(q, x.kv, None, False, 0.25).sum())(x.q)
