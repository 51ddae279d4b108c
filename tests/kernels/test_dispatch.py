"""What runs where: plans, rows that do not fit, few rows, warm-up."""

import pytest
import torch

pytest.importorskip("triton")

from triton.runtime.errors import OutOfResources

import stochca_kernels
from stochca_kernels import (
    Projection,
    attention,
    backward,
    backward_joint,
    dispatch,
    forward,
    launch,
    projected,
    stochca_attention,
    tokens,
)
from stochca_kernels.testing import make_inputs
from stochca_kernels.tiles import _TABLE, TilePlan, Tiles, plans, query_lanes

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
MODULES = (forward, backward, backward_joint, projected, tokens)
pytestmark = [
    pytest.mark.filterwarnings("ignore:Conversion of an array with ndim > 0 to a scalar"),
    pytest.mark.filterwarnings("ignore:(overflow|invalid value) encountered"),
]


@pytest.fixture
def launched(monkeypatch):
    """The kind of every launch, which computes nothing: kernel, tiles, and what it was compiled for."""
    kinds = []

    class Recorder:
        def __init__(self, name):
            self.name = name

        def __getitem__(self, grid):
            return lambda *args, **constants: kinds.append(
                (self.name, tuple(sorted(constants.items(), key=str)))
            )

    for module in MODULES:
        for name in [name for name in vars(module) if name.endswith("_kernel")]:
            monkeypatch.setattr(module, name, Recorder(name))
    return kinds


def test_a_plan_on_chip_covers_the_row_and_only_its_last_part_is_ragged():
    for length in range(1, 273):
        parts = TilePlan(length).parts
        assert sum(parts[:-1]) < length <= sum(parts), length
        assert sum(parts) - length < 32, length
        assert len(parts) <= 3, length
        assert all(part & (part - 1) == 0 and 16 <= part <= 128 for part in parts), length


def test_a_streamed_plan_has_a_tail_for_what_is_left():
    for length in range(1, 2000):
        plan = TilePlan(length, 128)
        assert plan.parts == ()
        assert length % 128 <= plan.tail <= max(16, 2 * (length % 128)), length
        assert (plan.tail == 0) == (length % 128 == 0), length


def test_plans_are_the_exact_ones():
    assert TilePlan(197).parts == (128, 64, 16)
    assert TilePlan(257).parts == (128, 128, 16)
    assert (TilePlan(785, 128).tail, 785 // 128) == (32, 6)
    assert TilePlan(197).useful_share == 197 / 208


def test_every_row_of_the_table_is_reached():
    reached = set()
    for key, columns in _TABLE.items():
        for column, rows in enumerate(columns):
            for row in rows:
                size = (64, 128) if not key[0].startswith("tokens") else (768, 1408)
                gpu = "sm_90" if key[1] == "nvidia" else key[1]
                found = plans(*key[:1], gpu, key[2], size[column], row.max_keys or 10_000)
                # The rows behind the first take its place where there are too many channels for it.
                if found and (found[0] == row or (key[0].startswith("tokens") and row in found)):
                    reached.add((key, column, row))
    assert reached == {
        (key, c, row) for key, columns in _TABLE.items() for c, rows in enumerate(columns) for row in rows
    }


def test_a_row_that_does_not_fit_gives_way_to_a_smaller_one(monkeypatch):
    monkeypatch.setattr(launch, "_TOO_LARGE", set())
    rows, tried = [Tiles(64, n, 4, 2, "test") for n in (0, 128, 32)], []
    q = torch.zeros(1, 1, 1, 64, device=DEVICE)

    def run(tiles):
        tried.append(tiles.block_n)
        if tiles.block_n != 32:
            raise OutOfResources(300_000, 232_448, "shared memory")

    for _ in range(2):
        launch.launch_largest("kernel", q, rows, run)
    assert tried == [0, 128, 32, 32]  # what did not fit once is not tried again
    launch.launch_largest("kernel", q[..., :32], rows, run)
    assert tried[4:] == [0, 128, 32]  # but for another size it may fit
    with pytest.raises(OutOfResources, match="shared memory"):
        launch.launch_largest("kernel", q, rows[:1], run)
    with pytest.raises(ValueError, match=r'has no tiles of .* use impl="sdpa"'):
        launch.launch_largest("kernel", q, (), run)


def test_lanes_fill_the_gpu_and_no_more(monkeypatch):
    monkeypatch.setattr("stochca_kernels.tiles._multiprocessors", lambda device: 132)
    assert query_lanes(1536, 4, torch.device("cpu")) == 1  # many heads: each reads its keys once
    assert query_lanes(192, 4, torch.device("cpu")) == 2
    assert query_lanes(12, 4, torch.device("cpu")) == 4


def test_one_launch_serves_target_and_source(launched):
    x = make_inputs(2, 2, 40, 40, 40, 32, device=DEVICE)
    coins = torch.tensor([False, True], device=DEVICE)
    for coin in (False, True, coins):
        launched.clear()
        stochca_attention(x.q, x.kv, x.source_kv, coin, source_q=x.source_q, impl="triton")
        assert [name for name, _ in launched] == ["_attn_fwd_kernel"]


def test_warmup_launches_all_that_a_training_step_does(launched):
    timm = pytest.importorskip("timm")
    stochca = pytest.importorskip("stochca")
    target = timm.create_model("vit_tiny_patch16_224", img_size=32, num_classes=3, depth=3).to(DEVICE)
    x = torch.randn(3, 3, 32, 32, device=DEVICE)
    for per in ("batch", "sample"):
        launched.clear()
        stochca_kernels.warmup(3, 64, 5, per_sample=per == "sample", dtype=torch.float32, device=DEVICE)
        warm = set(launched)
        launched.clear()
        model = stochca.StochCA(target, per=per, impl="triton").train()
        draws = {
            "batch": [[a, b, c] for a in (False, True) for b in (False, True) for c in (False, True)],
            "sample": [[torch.tensor([i % 2 == j % 2 for i in range(3)], device=DEVICE) for j in range(3)]],
        }
        for coins in draws[per]:
            model(x, coins=coins).sum().backward()
        assert set(launched) - warm == set()


@pytest.mark.filterwarnings("ignore:.*autograd.function.Function.* should not be instantiated")
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")
def test_a_compiled_model_runs_the_kernels_and_a_third_batch_size_compiles_nothing():
    timm = pytest.importorskip("timm")
    stochca = pytest.importorskip("stochca")
    import torch._dynamo.testing

    def build():
        torch.manual_seed(0)
        small = {"img_size": 32, "num_classes": 3, "embed_dim": 32, "num_heads": 1, "depth": 2}
        target = timm.create_model("vit_tiny_patch16_224", **small)
        return stochca.StochCA(target.to(DEVICE), impl="triton").train()

    eager, compiled = build(), build()
    counter = torch._dynamo.testing.CompileCounter()
    compiled.compile(fullgraph=True, backend=counter)
    graphs = []
    for batch in (2, 3, 4):
        x = torch.randn(batch, 3, 32, 32, device=DEVICE)
        for coins in ([False, True], [True, False]):  # blocks of either kind, of all and of class rows
            losses = []
            for model in (eager, compiled):
                model.zero_grad()
                losses.append(model(x, coins=coins).square().sum())
                losses[-1].backward()
            torch.testing.assert_close(losses[1], losses[0], rtol=1e-4, atol=1e-5)
            for (name, p), q in zip(eager.named_parameters(), compiled.parameters(), strict=True):
                torch.testing.assert_close(
                    q.grad, p.grad, rtol=1e-3, atol=1e-4, msg=lambda m, n=name: f"{n}: {m}"
                )
        graphs.append(counter.frame_count)
    assert graphs[2] == graphs[1] <= 2 * graphs[0]


def paths():
    """Every way through the kernels, as a function of one tensor that requires grad."""
    generator = torch.Generator().manual_seed(0)

    def draw(*shape):
        return torch.randn(shape, generator=generator).to(DEVICE)

    source = Projection(draw(2, 40, 48), draw(128, 48))
    row = Projection(draw(2, 40, 48), draw(128, 48))
    pair, coins = (draw(2, 2, 40, 32), draw(2, 2, 40, 32)), torch.tensor([False, True], device=DEVICE)
    return {
        "self": (lambda t: stochca_attention(t, None, None, False, impl="triton"), draw(2, 40, 3, 2, 32)),
        "cross": (lambda t: stochca_attention(t, None, pair, True, impl="triton"), draw(2, 2, 40, 32)),
        "mixed": (lambda t: stochca_attention(t, None, pair, coins, impl="triton"), draw(2, 40, 3, 2, 32)),
        "fused": (lambda t: stochca_attention(t, None, source, coins, impl="triton"), draw(2, 40, 3, 2, 32)),
        "few rows": (lambda t: stochca_attention(t, row, source, coins, impl="triton"), draw(2, 2, 1, 32)),
    }


each_path = pytest.mark.parametrize("path", paths())


@each_path
def test_activation_checkpointing_changes_nothing(path, monkeypatch):
    monkeypatch.setenv("STOCHCA_FUSED_PROJECTION", "1")
    call, t = paths()[path]
    grads = []
    for run in (call, lambda t: torch.utils.checkpoint.checkpoint(call, t, use_reentrant=False)):
        leaf = t.clone().requires_grad_()
        grads.append(torch.autograd.grad(run(leaf).square().sum(), leaf)[0])
    assert torch.equal(*grads)


@each_path
def test_autocast_runs_in_its_dtype_and_returns_gradients_in_theirs(path, monkeypatch):
    monkeypatch.setenv("STOCHCA_FUSED_PROJECTION", "1")
    call, t = paths()[path]
    leaf = t.clone().requires_grad_()
    with torch.autocast(DEVICE, torch.float16):
        out = call(leaf)
    assert out.dtype == torch.float16
    (grad,) = torch.autograd.grad(out.float().square().sum(), leaf)
    assert grad.dtype == torch.float32
    expected = torch.autograd.grad(call(leaf).square().sum(), leaf)[0]
    torch.testing.assert_close(grad, expected, rtol=0.05, atol=0.05 * expected.abs().max().item())


@each_path
def test_second_derivatives_and_functorch_are_refused(path, monkeypatch):
    monkeypatch.setenv("STOCHCA_FUSED_PROJECTION", "1")
    call, t = paths()[path]
    leaf = t.clone().requires_grad_()
    with pytest.raises(RuntimeError, match="no second derivative"):
        torch.autograd.grad(call(leaf).sum(), leaf, create_graph=True)
    with pytest.raises(RuntimeError, match=r"torch\.func"):
        torch.func.vmap(call)(t[None])
    with pytest.raises(RuntimeError, match=r"torch\.func"):
        torch.func.grad(lambda t: call(t).sum())(t)


def test_warmup_says_why_it_cannot(monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    if DEVICE == "cpu":
        with pytest.raises(ValueError, match="needs tensors on a GPU"):
            stochca_kernels.warmup(3, 64, 5, device="cpu")


def test_few_rows_launch_neither_keys_nor_values(launched):
    x = make_inputs(2, 2, 1, 1, 1, 32, device=DEVICE)
    side = Projection(torch.randn(2, 20, 64, device=DEVICE), torch.randn(128, 64, device=DEVICE))
    stochca_attention(x.q, side, side, torch.tensor([False, True], device=DEVICE), impl="triton")
    assert {name for name, _ in launched} <= {"_tokens_fwd_kernel", "_sum_splits_kernel"}
    launched.clear()
    stochca_attention(x.q.expand(-1, -1, 32, -1), side, None, False, impl="triton")
    assert {name for name, _ in launched} == {"_attn_fwd_kernel"}


def test_winners_name_where_they_come_from():
    for _, _, _, winner in dispatch._WINNERS:
        assert winner.choice in ("triton", "sdpa", "fused", "gemm")
        assert winner.origin == "predicted" or "commit" in winner.origin
    assert dispatch.winner("cross-attention", "sm_80", 197).choice == "triton"
    with pytest.raises(KeyError):
        dispatch.winner("anything else", "sm_90", 197)


KINDS = {
    "self-attention": lambda x, own: stochca_attention(x.q, own, None, False),
    "self-attention of a packed projection": lambda x, own: stochca_attention(
        torch.stack([t.transpose(1, 2) for t in (x.q, *own)], 2), None, None, False
    ),
    "coins": lambda x, own: stochca_attention(x.q, own, x.source_kv, torch.tensor([False, True])),
    "cross-attention": lambda x, own: stochca_attention(x.q, own, x.source_kv, True),
    "cross-attention beside a constant": lambda x, own: stochca_attention(x.q, x.source_kv, None, False),
    "attention without gradient": lambda x, own: stochca_attention(x.q.detach(), x.source_kv, None, False),
    "few rows": lambda x, own: stochca_attention(
        x.q[:, :, :1], None, Projection(torch.ones(2, 5, 8), torch.ones(64, 8)), True
    ),
}


@pytest.mark.parametrize("call", KINDS)
def test_auto_asks_by_whose_gradient_follows(call, monkeypatch):
    asked = []

    def select(device, dtype, head_dim, length, kind):
        asked.append(kind)
        return "reference", ""

    monkeypatch.setattr(attention, "select_impl", select)
    x = make_inputs(2, 2, 5, 5, 5, 16)
    own = tuple(t.clone().requires_grad_() for t in x.kv)
    KINDS[call](x._replace(q=x.q.clone().requires_grad_()), own)
    kinds = {"coins": "self-attention", "self-attention of a packed projection": "self-attention"}
    assert asked == [kinds.get(call, call.removesuffix(" beside a constant"))]
    with torch.no_grad():
        KINDS[call](x, own)
    assert asked[1] == ("few rows" if call == "few rows" else "attention without gradient")
