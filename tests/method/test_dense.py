"""What dense tasks read in training is what two whole passes compute, whatever they leave out."""

import itertools

import pytest
import torch

pytest.importorskip("triton")

from bench.counts import saved_bytes
from stochca_kernels.tiles import choose_tiles
from tests.losses.steps import make_pair, whole_step
from tests.method.test_rotary import SMALL
from tests.method.test_rotary import VARIANTS as ROTARY
from tests.models import make_images

DEPTH = 3
ALL_COINS = list(itertools.product([False, True], repeat=DEPTH))
every_pattern = pytest.mark.parametrize(
    "coins", ALL_COINS, ids=["".join("SC"[coin] for coin in coins) for coins in ALL_COINS]
)
gpu = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")]
MIXED = (True, False, torch.tensor([True, False]))
# 1,025 tokens: more than a program of the kernels keeps on chip at once.
LARGE = {"img_size": 256, "patch_size": 8, "depth": 1, "embed_dim": 16, "num_heads": 1}
OPTIONS = {
    "every-block": {},
    "last-block": {"indices": 1, "norm": True},
    "stop-early": {"indices": [0, 1], "norm": True, "stop_early": True},
    "first-block": {"indices": [0], "stop_early": True, "intermediates_only": True},
    "sequence": {"indices": [0, 2], "output_fmt": "NLC", "intermediates_only": True},
}


def tensors(outputs):
    """All outputs, in order."""
    if isinstance(outputs, torch.Tensor):
        return [outputs]
    return [t for part in outputs for t in tensors(part)]


def expected_outputs(model, images, coins, options):
    """What `forward_intermediates` returns with prefix tokens, of two whole passes."""
    depth = len(coins)
    blocks = options.get("indices", list(range(depth)))
    blocks = list(range(depth))[-blocks:] if isinstance(blocks, int) else blocks
    taps = whole_step(model, images, coins, range(depth + 1)).taps
    outputs = []
    for block in blocks:
        tokens = model.target.norm(taps[block + 1]) if options.get("norm") else taps[block + 1]
        prefix, patches = tokens.tensor_split([model.target.num_prefix_tokens], dim=1)
        if options.get("output_fmt") != "NLC":
            grid = [-(-size // patch) for size, patch in zip(images.shape[2:], (8, 8), strict=True)]
            patches = patches.transpose(1, 2).unflatten(2, grid)
        outputs += [patches, prefix] if prefix.shape[1] else [patches]
    last = blocks[-1] + 1 if options.get("stop_early") else depth
    return outputs if options.get("intermediates_only") else [model.target.norm(taps[last]), *outputs]


def gradients(model, outputs):
    """Of a sum in which every output has shares of its own."""
    generator = torch.Generator().manual_seed(1)
    shares = [torch.randn(t.shape, generator=generator, dtype=torch.float64).to(t) for t in outputs]
    total = sum((t * share).sum() for t, share in zip(outputs, shares, strict=True))
    parameters = [p for p in model.target.parameters() if p.requires_grad]
    return torch.autograd.grad(total, parameters, allow_unused=True, materialize_grads=True)


def assert_dense(model, images, coins, options, tolerance=1e-11):
    outputs = tensors(model.forward_intermediates(images, return_prefix_tokens=True, coins=coins, **options))
    expected = expected_outputs(model, images, coins, options)
    torch.testing.assert_close(outputs, expected, rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(
        gradients(model, outputs), gradients(model, expected), rtol=tolerance, atol=10 * tolerance
    )


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@every_pattern
def test_every_coin_pattern_equals_two_whole_passes(coins, options):
    assert_dense(make_pair(reg_tokens=2), make_images(), coins, options)


@pytest.mark.parametrize(
    "kwargs",
    [
        {"global_pool": "avg", "class_token": False},
        {"global_pool": "map", "class_token": False},
        {"qk_norm": True, "init_values": 0.5},
        {"pre_norm": True, "final_norm": False},
        {"num_classes": 0},
    ],
)
def test_other_models_and_coins_per_sample_equal_two_whole_passes(kwargs):
    for options in (OPTIONS["every-block"], OPTIONS["stop-early"]):
        assert_dense(make_pair(**kwargs), make_images(), MIXED, options)


@pytest.mark.parametrize("variant", ["dinov3", "eva02-clip", "rope-mixed", "pe-spatial", "naflex-axial"])
def test_models_with_rotary_embeddings_equal_two_whole_passes(variant):
    name, kwargs = ROTARY[variant]
    model = make_pair(name=name, **{**SMALL, **kwargs})
    model.target.rope.requires_grad_(False)  # timm takes learned frequencies through float32
    for coins, option in ((MIXED, "every-block"), ((True, False, True), "stop-early")):
        assert_dense(model, make_images(), coins, OPTIONS[option])


@pytest.mark.parametrize("size", [(24, 24), (40, 24), (16, 56)])
@pytest.mark.parametrize("name", ["vit_tiny_patch16_224", "vit_base_patch16_dinov3"])
def test_images_of_any_size_keep_their_grid(size, name):
    model = make_pair(name=name, dynamic_img_size=True)
    images = make_images(size=56)[..., : size[0], : size[1]]
    assert_dense(model, images, (True, False, True), OPTIONS["every-block"])


def test_images_that_patches_do_not_divide_are_padded_as_timm_pads_them():
    model = make_pair(dynamic_img_size=True, dynamic_img_pad=True)
    assert_dense(model, make_images(size=56)[..., :21, :34], (True, False, True), OPTIONS["every-block"])


@pytest.mark.parametrize("way", ["checkpointing", "recompute", "recompute-checkpointing"])
def test_what_saves_memory_changes_no_dense_gradient_and_keeps_fewer_bytes(way):
    kept = []
    for is_saving in (False, True):
        model = make_pair(stochca={"recompute": is_saving and "recompute" in way})
        model.set_grad_checkpointing(is_saving and "checkpointing" in way)
        for coins, name in (((False, True, True), "every-block"), (MIXED, "stop-early")):
            assert_dense(model, make_images(), coins, OPTIONS[name])
        kept.append(
            saved_bytes(
                lambda m=model: m.forward_intermediates(make_images(), coins=(False, True, False))[0],
                [*model.parameters(), *model.source.parameters()],
            )
        )
    assert kept[1] < 0.8 * kept[0]


@pytest.mark.usefixtures("compiler")
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor")
@pytest.mark.filterwarnings("ignore:.*autograd.function.Function.* should not be")
def test_a_compiled_model_gives_the_same_dense_outputs():
    model = make_pair()
    model.compile(backend="eager", fullgraph=True)
    for coins, name in (((False, True, False), "every-block"), ((True, True, False), "stop-early")):
        assert_dense(model, make_images(), coins, OPTIONS[name])


@every_pattern
def test_nothing_runs_after_the_last_block_asked_for_where_it_stops_early(coins):
    model = make_pair()
    ran = []
    for name, vit in (("target", model.target), ("source", model.source)):
        for i, block in enumerate(vit.blocks):
            block.norm1.register_forward_hook(lambda *_, name=name, i=i: ran.append((name, i)))
    model.forward_intermediates(make_images(), [0, 1], stop_early=True, coins=coins)
    read = max((i + 1 for i, coin in enumerate(coins[:2]) if coin), default=0)
    assert sorted(ran) == [("source", i) for i in range(read)] + [("target", 0), ("target", 1)]
    assert model.plan.coins == coins[:2]


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@every_pattern
def test_parameters_without_a_gradient_are_those_of_plain_timm(coins, options):
    """What DDP calls unused does not depend on the coins."""
    model = make_pair(qk_norm=True)

    def unused(outputs):
        model.zero_grad()
        sum(t.sum() for t in tensors(outputs)).backward()
        return {name for name, p in model.target.named_parameters() if p.grad is None}

    ours = unused(model.forward_intermediates(make_images(), coins=coins, **options))
    assert ours == unused(model.target.forward_intermediates(make_images(), **options))


def test_formats_other_than_timms_are_refused():
    with pytest.raises(ValueError, match=r'output_fmt must be "NCHW" or "NLC", got .NHWC.'):
        make_pair().forward_intermediates(make_images(), output_fmt="NHWC")


def test_a_large_image_equals_two_whole_passes_on_torchs_attention():
    model = make_pair(stochca={"impl": "sdpa"}, **LARGE)
    assert_dense(model, make_images(batch=1, size=256), (True,), {"norm": True})
    assert_dense(model, make_images(batch=1, size=256), (False,), {"norm": True})


# What lies outside of a tile may overflow in the interpreter, which says so; none of it is kept.
@pytest.mark.filterwarnings("ignore:(overflow|invalid value) encountered")
@pytest.mark.parametrize("coin", [False, pytest.param(True, marks=gpu)], ids=["self", "cross"])
def test_error_of_the_kernels_on_a_large_image_is_that_of_eager_torch_times_a_constant(coin):
    device = "cuda" if torch.cuda.is_available() else "cpu"
    q = torch.empty(1, 1, 1025, 16, device=device)
    assert all(0 < tiles.block_n < 1025 for tiles in choose_tiles("fwd", q, 1025))

    def outcome(impl, dtype):
        model = make_pair(dtype=dtype, stochca={"impl": impl}, **LARGE).to(device)
        images = make_images(batch=1, size=256, dtype=dtype).to(device)
        outputs = tensors(model.forward_intermediates(images, norm=True, coins=(coin,)))
        return [t.double() for t in (*outputs, *gradients(model, outputs))]

    actual, eager = outcome("triton", torch.float32), outcome("reference", torch.float32)
    for ours, theirs, exact in zip(actual, eager, outcome("reference", torch.float64), strict=True):
        assert (ours - exact).norm() <= 3 * (theirs - exact).norm() + 1e-9 * exact.norm()
