"""The contract of `stochca_attention`, whichever implementation runs it."""

import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from stochca_kernels import Projection, dispatch, stochca_attention
from stochca_kernels.dispatch import fuses_projection, select_impl
from stochca_kernels.reference import attention_reference
from stochca_kernels.testing import Inputs, assert_close_to_exact, make_inputs
from stochca_kernels.tiles import gpu_of

pytestmark = [
    pytest.mark.filterwarnings("ignore:Conversion of an array with ndim > 0 to a scalar"),
    pytest.mark.filterwarnings("ignore:(overflow|invalid value) encountered"),
]

ROOT = Path(__file__).parents[2]
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
COINS = [False, True, "mixed"]
impls = pytest.mark.parametrize("impl", ["reference", "sdpa", "triton"])
coins = pytest.mark.parametrize("coin", COINS, ids=["self", "cross", "mixed"])


@pytest.fixture
def x():
    return make_inputs(3, 2, 21, 19, 33, 24, device=DEVICE)


def coin_of(coin, batch: int = 3):
    return torch.arange(batch, device=DEVICE) % 2 == 1 if coin == "mixed" else coin


def leaf(t: Tensor) -> Tensor:
    return t.detach().clone(memory_format=torch.preserve_format).requires_grad_()


def by_hand(x: Inputs, coin, pair=None) -> Tensor:
    """The definition, written once more: one softmax over the selected pair of each sample."""
    rows = []
    for b in range(x.q.shape[0]):
        k, v = x.source_kv if (coin if isinstance(coin, bool) else bool(coin[b])) else (pair or x.kv)
        scores = torch.einsum("hqd,hkd->hqk", x.q[b], k[b]) / x.q.shape[-1] ** 0.5
        rows.append(torch.softmax(scores, -1) @ v[b])
    return torch.stack(rows)


def projection(
    batch: int, length: int, heads: int = 2, head_dim: int = 24, *, bias=True, seed=0
) -> Projection:
    generator = torch.Generator().manual_seed(seed)
    width = heads * head_dim
    x = torch.randn(batch, length, width, generator=generator)
    weight = torch.randn(2 * width, width, generator=generator) / width**0.5
    shift = torch.randn(2 * width, generator=generator) if bias else None
    return Projection(*(None if t is None else t.to(DEVICE) for t in (x, weight, shift)))


@impls
@coins
def test_each_sample_attends_to_the_pair_of_its_coin(x, impl, coin):
    coin = coin_of(coin)
    out = stochca_attention(x.q, x.kv, x.source_kv, coin, impl=impl)
    torch.testing.assert_close(out, by_hand(x, coin))


@impls
@coins
def test_source_attends_to_itself_in_the_same_call(x, impl, coin):
    coin = coin_of(coin)
    out, source_out = stochca_attention(x.q, x.kv, x.source_kv, coin, source_q=x.source_q, impl=impl)
    torch.testing.assert_close(out, by_hand(x, coin))
    torch.testing.assert_close(source_out, by_hand(x._replace(q=x.source_q), True))


@impls
@coins
def test_gradients_are_those_of_the_definition(x, impl, coin):
    coin = coin_of(coin)
    results = []
    for function in (
        lambda q, kv: stochca_attention(q, kv, x.source_kv, coin, impl=impl),
        lambda q, kv: by_hand(x._replace(q=q), coin, kv) + 0 * sum(t.sum() for t in kv),
    ):
        leaves = [leaf(t) for t in (x.q, *x.kv)]
        out = function(leaves[0], tuple(leaves[1:]))
        results.append(torch.autograd.grad(out.square().sum(), leaves))
    for actual, expected in zip(*results, strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-5)
    if coin is not False:
        used = torch.ones(3, dtype=torch.bool, device=DEVICE) if coin is True else coin
        assert all(grad[used].count_nonzero() == 0 for grad in results[0][1:])


@impls
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no_bias"])
@pytest.mark.parametrize("len_q", [1, 40])
@coins
def test_projections_give_what_their_pairs_give(impl, bias, len_q, coin):
    coin = coin_of(coin)
    own, source = projection(3, 19, bias=bias), projection(3, 33, bias=bias, seed=1)
    x = make_inputs(3, 2, len_q, 1, 1, 24, device=DEVICE)

    def pair(side):
        packed = torch.nn.functional.linear(*side[:3]).unflatten(-1, (2, 2, 24))
        return tuple(packed.permute(2, 0, 3, 1, 4))

    leaves = [leaf(t) for t in own if t is not None]
    q = leaf(x.q)
    out = stochca_attention(q, Projection(*leaves), source, coin, impl=impl)
    torch.testing.assert_close(
        out, by_hand(x._replace(kv=pair(own), source_kv=pair(source)), coin), rtol=1e-4, atol=1e-5
    )
    grads = torch.autograd.grad(out.square().sum(), (q, *leaves))
    expected_leaves = [leaf(t) for t in own if t is not None]
    expected_q = leaf(x.q)
    expected = by_hand(
        x._replace(q=expected_q, kv=pair(Projection(*expected_leaves)), source_kv=pair(source)), coin
    ) + 0 * sum(t.sum() for t in expected_leaves)
    expected_grads = torch.autograd.grad(expected.square().sum(), (expected_q, *expected_leaves))
    for grad, wanted in zip(grads, expected_grads, strict=True):
        torch.testing.assert_close(grad, wanted, rtol=1e-3, atol=1e-4)


@impls
@pytest.mark.parametrize("len_q", [1, 26], ids=["few", "full"])
def test_coins_may_have_any_stride(impl, len_q):
    # A column of the coins of all samples and blocks, and one coin for all
    columns = torch.tensor([[True, False], [False, True], [True, True]], device=DEVICE)
    own, source = projection(3, 19), projection(3, 33, seed=1)
    x = make_inputs(3, 2, len_q, 19, 33, 24, device=DEVICE)
    for sides in ((own, source), (x.kv, x.source_kv)):
        for coins in (*columns.unbind(1), columns[0, 0].expand(3)):
            actual = stochca_attention(x.q, *sides, coins, impl=impl)
            expected = attention_reference(x.q, *sides, coins.clone(), None, 24**-0.5)[0]
            torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-5)


@impls
@pytest.mark.parametrize("len_q", [1, 26], ids=["few", "full"])
def test_tokens_of_the_two_models_may_differ_in_width(impl, len_q):
    own, source = projection(3, 19), projection(3, 33, seed=1)
    source = source._replace(x=source.x[..., :40], weight=source.weight[:, :40])
    x = make_inputs(3, 2, len_q, 1, 1, 24, device=DEVICE)
    arguments = x.q, own, source, coin_of("mixed")
    actual = stochca_attention(*arguments, impl=impl)
    expected = attention_reference(*arguments, None, 24**-0.5)[0]
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-5)


@impls
@pytest.mark.parametrize("coin", [True, False], ids=["cross", "self"])
def test_unused_side_may_be_none(x, impl, coin):
    sides = (None, x.source_kv) if coin else (x.kv, None)
    torch.testing.assert_close(stochca_attention(x.q, *sides, coin, impl=impl), by_hand(x, coin))


@impls
@coins
def test_nan_in_the_unselected_pair_reaches_nothing(x, impl, coin):
    coin = coin_of(coin)
    used = coin if isinstance(coin, Tensor) else torch.full((3,), coin, device=DEVICE)
    for t in x.kv:
        t[used] = float("nan")
    for t in x.source_kv:
        t[~used] = float("nan")
    leaves = [leaf(t) for t in (x.q, *x.kv)]
    out = stochca_attention(leaves[0], tuple(leaves[1:]), x.source_kv, coin, impl=impl)
    assert out.isfinite().all()
    if impl != "reference" or coin is not True:
        for grad in torch.autograd.grad(out.sum(), leaves):
            assert grad.isfinite().all()


@impls
def test_nan_in_an_unselected_projection_reaches_nothing(x, impl):
    tokens = torch.randn(3, 19, 48, device=DEVICE)
    tokens[1] = torch.nan
    weight, bias = (torch.randn(shape, device=DEVICE) for shape in ((96, 48), (96,)))
    leaves = [leaf(t) for t in (x.q, tokens, weight, bias)]
    coin = torch.tensor([False, True, False], device=DEVICE)
    out = stochca_attention(leaves[0], Projection(*leaves[1:]), x.source_kv, coin, impl=impl)
    assert out.isfinite().all()
    for grad in torch.autograd.grad(out.sum(), leaves):
        assert grad.isfinite().all()


@impls
@pytest.mark.parametrize("len_q", [1, 26], ids=["few", "full"])
def test_nan_in_the_queries_of_a_sample_that_reads_the_source_reaches_no_weight(impl, len_q):
    q = make_inputs(3, 2, len_q, 1, 1, 24, device=DEVICE).q
    q[1] = torch.nan
    leaves = [leaf(t) for t in projection(3, 19)[:3]]
    coin = torch.tensor([False, True, False], device=DEVICE)
    out = stochca_attention(q, Projection(*leaves), projection(3, 33, seed=1), coin, impl=impl)
    for grad in torch.autograd.grad(out.sum(), leaves):
        assert grad.isfinite().all()


@impls
@pytest.mark.parametrize("len_q", [1, 26], ids=["few", "full"])
def test_nan_in_a_weight_reaches_no_sample_of_the_other_side(impl, len_q):
    coin = torch.tensor([False, True, False], device=DEVICE)
    for side, others in ((0, coin), (1, ~coin)):
        sides = [projection(3, 19), projection(3, 33, seed=1)]
        sides[side].weight[50] = torch.nan
        q = leaf(make_inputs(3, 2, len_q, 1, 1, 24, device=DEVICE).q)
        out = stochca_attention(q, *sides, coin, impl=impl)
        assert out[others].isfinite().all()
        assert torch.autograd.grad(out.sum(), q)[0][others].isfinite().all()


@impls
def test_an_empty_batch_of_coins_gives_empty_gradients(impl):
    x = make_inputs(0, 2, 21, 19, 33, 24, device=DEVICE)
    leaves = [leaf(t) for t in (x.q, *x.kv)]
    out = stochca_attention(leaves[0], tuple(leaves[1:]), x.source_kv, coin_of("mixed", 0), impl=impl)
    for t, grad in zip(leaves, torch.autograd.grad(out.sum(), leaves), strict=True):
        assert grad.shape == t.shape


@impls
def test_pairs_that_no_sample_reads_get_zero_gradients(x, impl):
    for coin in (True, torch.ones(3, dtype=torch.bool, device=DEVICE)):
        k, v = (leaf(t) for t in x.kv)
        out = stochca_attention(x.q, (k, v), x.source_kv, coin, impl=impl)
        for grad in torch.autograd.grad(out.sum(), (k, v)):
            assert torch.equal(grad, torch.zeros_like(k))


@impls
def test_result_is_token_major_so_that_merging_heads_is_a_view(x, impl):
    out, source_out = stochca_attention(x.q, x.kv, x.source_kv, False, source_q=x.source_q, impl=impl)
    for t in (out, source_out):
        assert t.transpose(1, 2).is_contiguous()
        t.transpose(1, 2).view(3, -1, 48)


@impls
def test_scale_multiplies_the_scores(x, impl):
    out = stochca_attention(x.q, x.kv, None, False, scale=0.5, impl=impl)
    torch.testing.assert_close(out, by_hand(x._replace(q=x.q * 0.5 * 24**0.5), False))


@impls
def test_autocast_casts_the_inputs_and_returns_its_dtype(x, impl):
    with torch.autocast(DEVICE, dtype=torch.float16):
        out = stochca_attention(leaf(x.q), x.kv, x.source_kv, False, impl=impl)
    assert out.dtype == torch.float16
    torch.testing.assert_close(out.float(), by_hand(x, False), rtol=1e-2, atol=1e-2)


@impls
def test_float16_error_is_at_most_twice_that_of_eager_torch(impl):
    x = make_inputs(2, 2, 65, 65, 65, 32, dtype=torch.float16, device=DEVICE)
    grad = torch.randn(x.q.shape, generator=torch.Generator().manual_seed(1)).to(DEVICE)
    results = []
    for name, dtype in ((impl, torch.float16), ("reference", torch.float16), ("reference", torch.float64)):
        cast = x.to(dtype)
        leaves = [leaf(t) for t in (cast.q, *cast.kv)]
        out = stochca_attention(leaves[0], tuple(leaves[1:]), cast.source_kv, coin_of("mixed", 2), impl=name)
        results.append((out, *torch.autograd.grad(out, leaves, grad.half().to(dtype))))
    for actual, eager, exact in zip(*results, strict=True):
        assert_close_to_exact(actual, eager, exact)


def bad_inputs():
    """Name, what is changed of a good call, and what the error must say."""
    meta = torch.device("meta")
    return {
        "impl": ({"impl": "magic"}, ValueError, "impl must be one of"),
        "coin_kind": ({"use_source": 1}, TypeError, "use_source must be a bool"),
        "coin_dtype": ({"use_source": torch.zeros(3)}, ValueError, "torch.bool tensor of shape"),
        "coin_shape": ({"use_source": torch.zeros(2, dtype=torch.bool)}, ValueError, r"shape \(3,\)"),
        "coin_device": (
            {"use_source": torch.zeros(3, dtype=torch.bool, device=meta)}, ValueError, "use_source must be"
        ),
        "q_rank": ({"q": torch.zeros(2, 21, 24)}, ValueError, r"q must have shape \(B, H, Nq, D\)"),
        "q_integer": ({"q": torch.zeros(3, 2, 21, 24, dtype=torch.int32)}, ValueError, "must be one of"),
        "head_size": ({"q": torch.zeros(3, 2, 21, 20)}, ValueError, "16 to 128 in steps of 8, got 20"),
        "head_size_large": ({"q": torch.zeros(3, 2, 21, 136)}, ValueError, "got 136"),
        "q_stride": ({"q": torch.zeros(3, 2, 24, 21).transpose(2, 3)}, ValueError, "unit last stride"),
        "no_heads": ({"q": torch.zeros(3, 0, 21, 24)}, ValueError, "at least one head"),
        "coin_numpy": ({"use_source": np.bool_(True)}, TypeError, "got numpy.bool"),
        "kv_missing": ({"kv": None}, ValueError, "kv is None"),
        "source_missing": ({"source_kv": None, "use_source": True}, ValueError, "source_kv is None"),
        "source_missing_for_source_q": ({"source_kv": None}, ValueError, "source_q is given"),
        "kv_kind": ({"kv": torch.zeros(3, 2, 19, 24)}, TypeError, "must be a pair"),
        "kv_not_tensors": ({"kv": (1, 2)}, TypeError, "must be a tensor"),
        "k_shape": (
            {"kv": (torch.zeros(3, 1, 19, 24),) * 2}, ValueError, r"\(k\) must have shape \(3, 2, any, 24\)"
        ),
        "v_shape": (
            {"kv": (torch.zeros(3, 2, 19, 24), torch.zeros(3, 2, 18, 24))}, ValueError, r"\(v\) must have"
        ),
        "no_tokens": ({"kv": (torch.zeros(3, 2, 0, 24),) * 2}, ValueError, "at least one token"),
        "k_dtype": ({"kv": (torch.zeros(3, 2, 19, 24).half(),) * 2}, ValueError, "q's dtype torch.float32"),
        "k_device": (
            {"kv": (torch.zeros(3, 2, 19, 24, device=meta),) * 2}, ValueError, "on q's device"
        ),
        "source_q_shape": ({"source_q": torch.zeros(3, 2, 33, 16)}, ValueError, "source_q must have shape"),
        "source_requires_grad": (
            {"source_kv": (torch.zeros(3, 2, 33, 24, requires_grad=True),) * 2}, ValueError, "requires grad"
        ),
        "source_q_requires_grad": (
            {"source_q": torch.zeros(3, 2, 33, 24, requires_grad=True)}, ValueError, "requires grad"
        ),
        "weight_shape": (
            {"kv": Projection(torch.zeros(3, 19, 48), torch.zeros(48, 48))}, ValueError, r"shape \(96"
        ),
        "bias_shape": (
            {"kv": Projection(torch.zeros(3, 19, 48), torch.zeros(96, 48), torch.zeros(9))},
            ValueError, r"bias must have shape \(96",
        ),
        "x_batch": (
            {"kv": Projection(torch.zeros(2, 19, 48), torch.zeros(96, 48))}, ValueError, r"x must have shape"
        ),
    }  # fmt: skip


@impls
@pytest.mark.parametrize("name", bad_inputs())
def test_bad_input_is_refused_with_what_was_wanted(x, impl, name):
    changed, error, message = bad_inputs()[name]
    arguments = {
        "q": x.q, "kv": x.kv, "source_kv": x.source_kv, "use_source": False, "source_q": x.source_q,
        "impl": impl,
    }  # fmt: skip
    changed = {
        key: value.to(DEVICE) if isinstance(value, Tensor) and value.device.type == "cpu" else value
        for key, value in changed.items()
    }
    with pytest.raises(error, match=message):
        stochca_attention(**{**arguments, **changed})


def test_triton_refuses_float64(x):
    x = x.to(torch.float64)
    with pytest.raises(ValueError, match=r"float16, bfloat16 or float32, got torch\.float64"):
        stochca_attention(x.q, x.kv, x.source_kv, False, impl="triton")


def test_triton_refuses_a_tensor_outside_a_gpu(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    x = make_inputs(1, 1, 4, 4, 4, 16)
    with pytest.raises(ValueError, match="needs tensors on a GPU"):
        stochca_attention(x.q, x.kv, x.source_kv, False, impl="triton")


def test_without_triton_everything_else_works_and_its_error_says_so():
    code = """
import sys
class Blocker:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == "triton":
            raise ModuleNotFoundError("No module named 'triton'", name="triton")
sys.meta_path.insert(0, Blocker())
import importlib.util
find_spec = importlib.util.find_spec
importlib.util.find_spec = lambda name, package=None: None if name == "triton" else find_spec(name, package)
import torch, stochca_kernels
q = torch.randn(1, 2, 5, 16)
stochca_kernels.stochca_attention(q, (q, q), None, False)
try:
    stochca_kernels.stochca_attention(q, (q, q), None, False, impl="triton")
except ValueError as error:
    assert "triton, which is not installed" in str(error), error
else:
    raise AssertionError("impl='triton' ran without triton")
assert not any(name.partition(".")[0] == "triton" for name in sys.modules)
"""
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    result = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, env=environment, capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stderr


@pytest.mark.parametrize(
    ("device", "capability", "dtype", "head_dim", "impl", "reason"),
    [
        ("cpu", None, torch.bfloat16, 64, "sdpa", "the device is cpu"),
        ("cuda", (9, 0), torch.bfloat16, 64, "triton", r"triton is measured .* capability \(9, 0\)"),
        ("cuda", (8, 0), torch.float16, 72, "triton", r"capability \(8, 0\)"),
        ("cuda", (7, 5), torch.float16, 64, "sdpa", r"needs? compute capability 8.0, cuda has \(7, 5\)"),
        ("cuda", (9, 0), torch.float32, 64, "sdpa", "the dtype is torch.float32"),
        ("cuda", (9, 0), torch.bfloat16, 20, "sdpa", "got 20"),
    ],
)
def test_auto_says_what_it_runs_and_why(monkeypatch, device, capability, dtype, head_dim, impl, reason):
    pytest.importorskip("triton")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: capability)
    remembered = (gpu_of, dispatch._selected)
    for function in remembered:
        function.cache_clear()
    selected, why = select_impl(torch.device(device), dtype, head_dim)
    for function in remembered:
        function.cache_clear()
    assert selected == impl
    assert re.search(reason, why)


def test_the_environment_replaces_what_auto_selects(monkeypatch):
    monkeypatch.setenv("STOCHCA_IMPL", "reference")
    assert select_impl(torch.device("cpu"), torch.float32, 64) == (
        "reference",
        "STOCHCA_IMPL=reference is set",
    )
    monkeypatch.setenv("STOCHCA_IMPL", "fastest")
    with pytest.raises(ValueError, match=r"STOCHCA_IMPL must be one of .*, got 'fastest'"):
        stochca_attention(*make_inputs(1, 1, 3, 3, 3, 16, device=DEVICE)[:3], False)
    monkeypatch.delenv("STOCHCA_IMPL")
    monkeypatch.setenv("STOCHCA_FUSED_PROJECTION", "yes")
    with pytest.raises(ValueError, match=r"STOCHCA_FUSED_PROJECTION must be one of .*, got 'yes'"):
        fuses_projection(torch.device("cpu"), 197)
