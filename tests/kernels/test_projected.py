"""A source's keys and values computed inside the kernel, and packed projections, against the definition."""

import pytest
import torch

pytest.importorskip("triton")

from stochca_kernels import Projection, projected, stochca_attention
from stochca_kernels.testing import assert_close_to_exact
from tests.kernels.test_triton import DEVICE, coins_of, inside_nan, poisoned_outputs  # noqa: F401

pytestmark = [
    pytest.mark.filterwarnings("ignore:Conversion of an array with ndim > 0 to a scalar"),
    pytest.mark.filterwarnings("ignore:(overflow|invalid value) encountered"),
]

COINS = pytest.mark.parametrize("coin", [False, True, "mixed"], ids=["self", "cross", "mixed"])
SOURCE_Q = pytest.mark.parametrize("source_q", ["none", "given", "projected"])
GRADS = ("dq", "dk", "dv", "dqkv")


@pytest.fixture(autouse=True)
def fused(monkeypatch):
    monkeypatch.setenv("STOCHCA_FUSED_PROJECTION", "1")


@pytest.fixture
def streamed(monkeypatch):
    """As for rows that do not fit on chip: keys and values in a slot of scratch memory per program."""
    choose = projected.choose_tiles

    def rows(kernel, q, *lengths):
        return tuple(tiles for tiles in choose(kernel, q, *lengths) if tiles.block_n)

    monkeypatch.setattr(projected, "choose_tiles", rows)


class Case:
    """Tensors of one call; `source` projects, `qkv` is the target's own packed projection."""

    def __init__(
        self,
        length=70,
        len_source=70,
        heads=2,
        head_dim=40,
        channels=48,
        batch=3,
        dtype=torch.float32,
        bias=True,
        rstd=True,
    ):
        generator = torch.Generator().manual_seed(0)

        def draw(*shape, scale=1.0, to=dtype):
            return (torch.randn(shape, generator=generator) * scale).to(DEVICE, to)

        width = heads * head_dim
        self.qkv = draw(batch, length, 3, heads, head_dim)
        self.source_q = draw(batch, len_source, heads, head_dim).transpose(1, 2)
        x = inside_nan(draw(batch, len_source, channels))
        factor = draw(batch, len_source, to=torch.float32).sigmoid() + 0.25 if rstd else None
        factor = factor if factor is None else inside_nan(factor)

        def weight(rows):
            shift = inside_nan(draw(rows)) if bias else None
            return Projection(x, inside_nan(draw(rows, channels, scale=channels**-0.5)), shift, factor)

        self.source, self.own_q = weight(2 * width), weight(width)

    def to(self, dtype):
        other = object.__new__(Case)
        other.qkv, other.source_q = self.qkv.detach().to(dtype), self.source_q.to(dtype)

        def cast(side):
            return Projection(*(None if t is None else t.to(dtype) for t in side[:3]), side.rstd)

        other.source, other.own_q = cast(self.source), cast(self.own_q)
        return other

    def run(self, coin, impl, source_q="none", packed=False):
        """Outputs and gradients by name."""
        qkv = self.qkv.detach().requires_grad_()
        q, k, v = (t.detach().requires_grad_() for t in qkv.permute(2, 0, 3, 1, 4))
        leaves = (qkv,) if packed else (q, k, v)
        asking = {"none": None, "given": self.source_q, "projected": self.own_q}[source_q]
        own = (qkv, None) if packed else (q, (k, v))
        out = stochca_attention(*own, self.source, coin, source_q=asking, impl=impl)
        results = {}
        if asking is not None:
            out, results["source_out"] = out
        generator = torch.Generator().manual_seed(1)
        grad = torch.randn(out.shape, generator=generator).to(out.device, torch.float16).to(out.dtype)
        grads = torch.autograd.grad(out, leaves, inside_nan(grad))
        return {
            **results,
            "out": out.detach(),
            **dict(zip(GRADS[3:] if packed else GRADS, grads, strict=packed)),
        }


def assert_exact_enough(case, coin, **options):
    """The error of the kernels is at most that of eager torch times a constant; what they computed."""
    coin = coins_of(case.qkv.shape[0]) if coin == "mixed" else coin
    actual = case.run(coin, "triton", **options)
    eager = case.run(coin, "reference", **options)
    exact = case.to(torch.float64).run(coin, "reference", **options)
    for name, value in actual.items():
        if name == "dq" and exact[name].abs().max() < 1e-12:
            # With one key the scores have no gradient: two equal sums cancel, up to their rounding.
            assert value.abs().max() < 1e-5
            continue
        factor = 3.0 if name in GRADS else 2.0
        assert_close_to_exact(value, eager[name], exact[name], factor=factor)
        assert_close_to_exact(value, eager[name], exact[name], measure="rms")
    return actual


@COINS
@SOURCE_Q
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=["fp32", "fp16"])
def test_error_on_chip_is_at_most_twice_that_of_eager_torch(coin, source_q, dtype):
    assert_exact_enough(Case(dtype=dtype), coin, source_q=source_q)


@COINS
@SOURCE_Q
@pytest.mark.usefixtures("streamed")
def test_error_over_scratch_memory_is_at_most_twice_that_of_eager_torch(coin, source_q):
    assert_exact_enough(Case(length=70, len_source=150), coin, source_q=source_q)


@pytest.mark.parametrize("length", [1, 16, 17, 197, 208, 257, 272, 273, 401])
def test_any_length_of_the_source(length):
    assert_exact_enough(Case(length=20, len_source=length, heads=1, batch=1), True, source_q="projected")


@pytest.mark.parametrize("mode", ["on_chip", "streamed"])
@pytest.mark.parametrize(
    "options",
    [
        {"head_dim": 16, "channels": 16},
        {"head_dim": 80, "channels": 100},
        {"head_dim": 128, "channels": 130},
        {"bias": False},
        {"rstd": False},
        {"bias": False, "rstd": False, "channels": 64},
    ],
    ids=str,
)
def test_any_head_size_width_and_optional_term(request, mode, options):
    if mode == "streamed":
        request.getfixturevalue("streamed")
    assert_exact_enough(
        Case(length=33, len_source=40, heads=1, batch=2, **options), "mixed", source_q="projected"
    )


@pytest.mark.parametrize("mode", ["on chip", "streamed"])
def test_factors_may_lie_anywhere(request, mode):
    if mode == "streamed":
        request.getfixturevalue("streamed")
    case = Case()
    expected = case.run(True, "triton", source_q="projected")
    apart = torch.stack([case.source.rstd, torch.full_like(case.source.rstd, float("nan"))], -1)[..., 0]
    case.source, case.own_q = (side._replace(rstd=apart) for side in (case.source, case.own_q))
    actual = case.run(True, "triton", source_q="projected")
    assert all(torch.equal(actual[name], expected[name]) for name in expected)


@COINS
@SOURCE_Q
def test_packed_gradients_are_written_packed(coin, source_q):
    case = Case()
    packed = assert_exact_enough(case, coin, source_q=source_q, packed=True)
    apart = case.run(coins_of(3) if coin == "mixed" else coin, "triton", source_q=source_q)
    assert packed["dqkv"].is_contiguous() or coin is True  # which takes the queries alone
    for i, name in enumerate(GRADS[:3]):
        assert torch.equal(packed["dqkv"][:, :, i].transpose(1, 2), apart[name]), name


def test_small_heads_and_long_rows_stream_and_others_stay_on_chip(monkeypatch):
    cuts = []
    constants = projected._constants
    monkeypatch.setattr(
        projected, "_constants", lambda *args: cuts.append(constants(*args)["PARTS"]) or constants(*args)
    )
    for options in ({"head_dim": 32}, {"head_dim": 40}, {"len_source": 273}):
        Case(batch=1, **options).run(True, "triton", source_q="given")
    assert cuts == [(), (), (64, 16), (64, 16), (), ()]  # forward and backward of each


@pytest.mark.parametrize("coin", [False, "mixed"], ids=["self", "mixed"])
def test_packed_gradients_reach_a_linear_layer_without_another_copy(coin, monkeypatch):
    monkeypatch.setenv("STOCHCA_FUSED_PROJECTION", "0")
    case, layer = Case(), torch.nn.Linear(24, 240, device=DEVICE)
    coins = coins_of(3) if coin == "mixed" else coin
    x = torch.randn(3, 70, 24, device=DEVICE)
    with torch.profiler.profile(acc_events=True) as profile:
        out = stochca_attention(layer(x).unflatten(-1, (3, 2, 40)), None, case.source, coins, impl="triton")
        out.sum().backward()
    copies = {event.name for event in profile.events()} & {
        "aten::stack",
        "aten::cat",
        "aten::select_backward",
    }
    assert copies == set()
    assert layer.weight.grad.isfinite().all()


def test_samples_that_read_their_own_pair_never_touch_the_sources_tokens():
    case, coins = Case(), coins_of(3)
    expected = case.run(coins, "triton")
    for t in (case.source.x, case.source.rstd):
        t[~coins] = float("nan")
    case.qkv[coins][:, :, 1:] = float("nan")
    for name, value in case.run(coins, "triton").items():
        assert torch.equal(value, expected[name]), name


@pytest.mark.parametrize("mode", ["on_chip", "streamed"])
def test_repeats_are_bitwise_equal(request, mode):
    if mode == "streamed":
        request.getfixturevalue("streamed")
    case = Case(dtype=torch.float16)
    first, second = (case.run(coins_of(3), "triton", source_q="projected") for _ in range(2))
    for name in first:
        assert torch.equal(first[name], second[name]), name


@pytest.mark.usefixtures("streamed")
def test_scratch_memory_does_not_grow_with_the_batch(monkeypatch):
    sizes = []
    programs = projected._programs
    monkeypatch.setattr(
        projected, "_programs", lambda *args: sizes.append(programs(*args)[1].numel()) or programs(*args)
    )
    for batch in (3, 9):
        Case(batch=batch, length=40, len_source=20).run(True, "triton")
    assert sizes == [sizes[0]] * 4
    assert sizes[0] == projected.resident_programs(torch.device(DEVICE)) * 2 * 20 * 40


def test_keys_and_values_are_not_saved_for_the_backward():
    case, saved = Case(length=300, len_source=300, channels=32), []
    q = case.qkv[:, :, 0].transpose(1, 2).clone().requires_grad_()
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t.detach(), lambda t: t):
        stochca_attention(q, None, case.source, True, impl="triton")
    assert any(t.data_ptr() == case.source.x.data_ptr() for t in saved)
    written = [t for t in saved if t.data_ptr() not in {s.data_ptr() for s in (q, *case.source)}]
    assert sorted(t.numel() for t in written) == sorted((q.numel(), q[..., 0].numel()))  # output, log-sum-exp


def test_a_source_that_only_its_own_queries_read_is_not_saved():
    case, saved = Case(), []
    with torch.autograd.graph.saved_tensors_hooks(
        lambda t: saved.append(t.data_ptr()) or t.detach(), lambda t: t
    ):
        stochca_attention(
            case.qkv.requires_grad_(), None, case.source, False, source_q=case.own_q, impl="triton"
        )
    assert case.source.x.data_ptr() not in saved
    assert case.qkv.data_ptr() in saved


def test_the_folded_norm_is_the_layer_norm():
    torch.manual_seed(0)
    norm, layer = torch.nn.LayerNorm(48).to(DEVICE), torch.nn.Linear(48, 128).to(DEVICE)
    torch.nn.init.normal_(norm.weight)
    torch.nn.init.normal_(norm.bias)
    norm.requires_grad_(False)
    layer.requires_grad_(False)
    x = torch.randn(2, 50, 48, device=DEVICE) * 3 + 1
    q = torch.randn(2, 2, 50, 32, device=DEVICE)
    weight = layer.weight * norm.weight
    folded = Projection(
        x,
        weight - weight.mean(1, keepdim=True),
        layer.bias + layer.weight @ norm.bias,
        (x.var(-1, unbiased=False) + norm.eps).rsqrt(),
    )
    plain = Projection(norm(x), layer.weight, layer.bias)
    for impl in ("triton", "sdpa", "reference"):
        for rows in (q, q[:, :, :1]):
            actual = stochca_attention(rows, None, folded, True, impl=impl)
            expected = stochca_attention(rows, None, plain, True, impl="reference")
            torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("coin", [True, "mixed"], ids=["cross", "mixed"])
def test_operators_satisfy_opcheck(coin, monkeypatch):
    monkeypatch.undo()
    import stochca_kernels.autograd  # noqa: F401

    case = Case(length=20, len_source=20, batch=2)
    q, k, v = case.qkv.permute(2, 0, 3, 1, 4)
    own = (q, None, None) if coin is True else (q, k, v)
    coins = None if coin is True else coins_of(2)
    asking = (None, case.own_q.weight, case.own_q.bias)
    args = (*own, *case.source, coins)
    torch.library.opcheck(torch.ops.stochca.projected_attention_forward, (*args, *asking, 0.25, True))
    out, lse, _ = torch.ops.stochca.projected_attention_forward(*args, *asking, 0.25, True)
    for needs_dkdv in (False, coin == "mixed"):
        torch.library.opcheck(
            torch.ops.stochca.projected_attention_backward, (out, *args, out, lse, 0.25, needs_dkdv)
        )
    if coin == "mixed":
        torch.library.opcheck(
            torch.ops.stochca.packed_projected_attention_backward,
            (out, case.qkv, *case.source, coins, out, lse, 0.25),
        )
        torch.library.opcheck(
            torch.ops.stochca.packed_attention_backward, (out, case.qkv, k, v, coins, out, lse, 0.25)
        )


@pytest.mark.filterwarnings("ignore:.*autograd.function.Function.* should not be instantiated")
def test_packed_and_fused_calls_compile_as_one_graph_once_for_all_batch_sizes(monkeypatch):
    monkeypatch.undo()
    monkeypatch.setenv("STOCHCA_FUSED_PROJECTION", "1")
    import torch._dynamo.testing

    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")

    @torch.compile(fullgraph=True, backend=counter)
    def compiled(qkv, source, own_q, coins):
        out, source_out = stochca_attention(qkv * 2, None, source, coins, source_q=own_q, impl="triton")
        return out + source_out

    for batch in (2, 3, 5):
        case = Case(length=20, len_source=20, batch=batch)
        results = []
        for function in (compiled, compiled._torchdynamo_orig_callable):
            qkv = case.qkv.detach().requires_grad_()
            out = function(qkv, case.source, case.own_q, coins_of(batch))
            results.append((out, *torch.autograd.grad(out.square().sum(), qkv)))
        for actual, expected in zip(*results, strict=True):
            torch.testing.assert_close(actual, expected)
    assert counter.frame_count == 2


def test_autocast_keeps_the_factors_and_reads_the_tokens_once():
    case = Case(dtype=torch.float32)
    with torch.autocast(DEVICE, torch.float16):
        out, source_out = stochca_attention(
            case.qkv, None, case.source, True, source_q=case.own_q, impl="triton"
        )
    half = case.to(torch.float16)
    half.own_q = half.own_q._replace(x=half.source.x)
    expected = stochca_attention(half.qkv, None, half.source, True, source_q=half.own_q, impl="triton")
    assert out.dtype == torch.float16
    assert torch.equal(out, expected[0])
    assert torch.equal(source_out, expected[1])
