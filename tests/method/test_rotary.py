"""timm's Eva family (EVA, EVA-02, DINOv3, PE, ViTs with rotary embeddings) is driven exactly."""

import copy
import itertools
from unittest import mock

import pytest
import timm
import torch

from bench.counts import saved_bytes
from stochca import StochCA
from tests import plain
from tests.method.test_exact import assert_same
from tests.method.test_training import compiles
from tests.models import make_images, make_model, make_target

SMALL = {"depth": 3, "embed_dim": 48, "num_heads": 3}
# One small instance of each kind of attention, block and rotation among timm's architectures.
VARIANTS = {
    "eva": ("eva_giant_patch14_224", {}),
    "eva-clip": ("eva_giant_patch14_clip_224", {}),
    "eva02-split-swiglu": ("eva02_base_patch14_224", {}),
    "eva02-fused-glu": ("eva02_small_patch14_224", {}),
    "eva02-clip": ("eva02_base_patch16_clip_224", {}),
    "rope-registers": ("vit_base_patch16_rope_reg1_gap_256", {}),
    "rope-axial": ("vit_base_patch16_rope_224", {}),
    "rope-mixed": ("vit_base_patch16_rope_mixed_224", {}),
    "rope-and-absolute": ("vit_base_patch16_rope_ape_224", {}),
    "pe-core": ("vit_pe_core_base_patch16_224", {}),
    "pe-spatial": ("vit_pe_spatial_base_patch16_512", {}),
    "pe-lang": ("vit_pe_lang_large_patch14_448", {}),
    "dinov3": ("vit_base_patch16_dinov3", {}),
    "dinov3-bias": ("vit_base_patch16_dinov3_qkvb", {}),
    "dinov3-swiglu": ("vit_7b_patch16_dinov3", {}),
    "lingbot": ("vit_base_patch16_lingbot", {}),
    "sapiens2": ("vit_base_patch16_sapiens2", {"num_kv_heads": 3}),
    "shared-heads": ("vit_5b_patch16_sapiens2", {"num_heads": 4, "embed_dim": 64, "num_kv_heads": (4, 2, 1)}),
    "norm-in-attention": ("vit_base_patch16_rope_224", {"scale_attn_inner": True, "qk_norm": True}),
    "naflex-axial": (
        "naflexvit_base_patch16_gap",
        {"rope_type": "axial", "global_pool": "token", "class_token": True},
    ),
    "naflex-mixed": ("naflexvit_base_patch16_gap", {"rope_type": "mixed", "global_pool": "avg"}),
    "naflex-dinov3": ("naflexvit_base_patch16_gap", {"rope_type": "dinov3", "rope_rotate_half": True}),
    "naflex-gated": ("naflexvit_base_patch16_gap", {"attn_type": "eva", "attn_gated": True}),
}
COINS = list(itertools.product([False, True], repeat=3))


# Moved at random in training, of which there is a test of its own.
for variant in ("sapiens2", "shared-heads"):
    VARIANTS[variant][1]["rope_rescale_coords"] = 1.0
VARIANTS = {variant: model for variant, model in VARIANTS.items() if timm.is_model(model[0])}  # of this timm


def build(variant, **stochca):
    name, kwargs = VARIANTS[variant]
    return make_model(name, stochca=stochca, **{**SMALL, **kwargs})


@pytest.mark.parametrize("variant", VARIANTS)
def test_every_coin_pattern_equals_the_full_computation(variant):
    model, images = build(variant), make_images()
    for coins in COINS:
        assert_same(model, images, coins)


@pytest.mark.parametrize("variant", VARIANTS)
def test_the_plain_computation_is_timms(variant):
    target, images = build(variant).target.eval(), make_images()
    expected = plain.logits(target, target, images, (False,) * 3)
    torch.testing.assert_close(target(images), expected, rtol=1e-12, atol=1e-12)


def test_positions_that_move_in_training_are_the_same_for_target_and_source():
    model, images = build("rope-axial"), make_images()
    moving = make_target("vit_base_patch16_rope_224", **SMALL, rope_shift_coords=0.5)
    model.target.rope = moving.rope.train()
    torch.manual_seed(3)
    moved = model.target.rope.get_embed()
    torch.manual_seed(3)
    out = model(images, coins=(True, False, True))
    with (
        mock.patch.object(model.target.rope, "get_embed", return_value=moved),
        mock.patch.object(model.source.rope, "get_embed", return_value=moved),
    ):
        expected = plain.logits(model.target, model.source, images, (True, False, True))
    torch.testing.assert_close(out, expected, rtol=1e-12, atol=1e-12)
    assert not torch.allclose(moved, model.source.rope.get_embed())


def test_positions_that_move_where_the_source_cannot_follow_are_refused():
    learned = make_target("vit_base_patch16_rope_mixed_224", **SMALL, rope_shift_coords=0.5)
    with pytest.raises(ValueError, match="leave out rope_shift_coords"):
        StochCA(learned)
    moving = make_target("vit_base_patch16_rope_224", **SMALL, rope_shift_coords=0.5)
    larger = make_target("vit_base_patch16_rope_224", **SMALL, img_size=32)
    with pytest.raises(ValueError, match="images have one size"):
        StochCA(moving, larger)


@pytest.mark.parametrize("variant", ["eva", "eva02-split-swiglu", "dinov3", "rope-mixed", "sapiens2"])
def test_every_parameter_has_a_gradient_in_every_step(variant):
    """As `DistributedDataParallel` needs it."""
    model = build(variant)
    for coins in COINS:
        model.zero_grad()
        model(make_images(), coins=coins).sum().backward()
        assert [n for n, p in model.named_parameters() if p.grad is None] == []


@pytest.mark.parametrize("variant", ["eva", "eva02-split-swiglu", "dinov3", "rope-mixed", "sapiens2"])
@pytest.mark.parametrize("setting", ["checkpointing", "recompute", "both"])
def test_recomputation_changes_no_gradient(variant, setting):
    model, images, coins = build(variant), make_images(), (False, True, True)
    expected = model(images, coins=coins)
    grads = plain.gradients(model.target, expected)
    model.recompute = setting != "checkpointing"
    model.set_grad_checkpointing(setting != "recompute")
    out = model(images, coins=coins)
    # Both leave keys and values to a checkpoint, which may compute them in another product.
    tolerance = 1e-12 if setting == "both" else 0.0
    torch.testing.assert_close(out, expected, rtol=tolerance, atol=tolerance)
    for name, grad in plain.gradients(model.target, out).items():
        torch.testing.assert_close(grad, grads[name], rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("variant", ["eva02-split-swiglu", "dinov3", "sapiens2"])
def test_a_source_that_recomputes_keeps_its_tokens_instead_of_keys_and_values(variant):
    model, images = build(variant, recompute=True, class_rows=False), make_images()

    def kept(coins):
        parameters = [*model.parameters(), *model.source.parameters()]
        return saved_bytes(lambda: model(images, coins=coins), parameters)

    num_tokens = model.target.patch_embed.num_patches + model.target.num_prefix_tokens
    tokens = images.shape[0] * num_tokens * 48 * images.element_size()
    for num_blocks in range(1, 4):
        coins = [i < num_blocks for i in range(3)]
        with mock.patch("stochca.recompute.Recomputation.of_pair"):
            as_pairs = kept(coins)
        assert as_pairs - kept(coins) == num_blocks * tokens


@pytest.mark.parametrize("variant", ["dinov3", "rope-axial", "eva02-split-swiglu", "sapiens2", "eva"])
def test_a_step_keeps_no_more_than_one_of_timm(variant):
    """Neither queries and keys before their rotation, nor those of a source that is not read."""
    model, images = build(variant), make_images()

    def kept(forward):
        return saved_bytes(forward, [*model.parameters(), *model.source.parameters()])

    plain_bytes = kept(lambda: model.target(images))
    for coins in COINS:
        assert kept(lambda coins=coins: model(images, coins=coins)) <= plain_bytes


@pytest.mark.parametrize("variant", ["eva", "eva02-split-swiglu", "dinov3", "shared-heads"])
@pytest.mark.parametrize("impl", ["triton", "sdpa", "reference"])
def test_every_implementation_of_the_operator_takes_them(variant, impl):
    model, images = build(variant, impl=impl).float(), make_images()
    exact = copy.deepcopy(model).double()
    coins = [torch.tensor([True, False]), True, False]
    expected = plain.logits(exact.target, exact.source, images, coins)
    wanted = plain.gradients(exact.target, expected)
    out = model(images.float(), coins=coins)
    torch.testing.assert_close(out.double(), expected, rtol=1e-4, atol=1e-4)
    for name, grad in plain.gradients(model.target, out).items():
        scale = wanted[name].abs().max().item() + 1e-3
        torch.testing.assert_close(grad.double(), wanted[name], rtol=0, atol=1e-4 * scale)


@pytest.mark.parametrize("variant", ["eva02-clip", "dinov3", "norm-in-attention"])
def test_autocast_is_about_as_exact_as_eager_torch(variant):
    """Norms leave float32, products bfloat16; after a rotation queries and keys are of one dtype again."""
    model, images = build(variant).float(), make_images(dtype=torch.float32)
    exact = copy.deepcopy(model).double()
    for coins in COINS:
        expected = plain.logits(exact.target, exact.source, images.double(), coins)
        with torch.autocast("cpu", torch.bfloat16):
            ours, eager = model(images, coins=coins), plain.logits(model.target, model.source, images, coins)
        allowed = 2 * (eager.double() - expected).abs().max() + 4e-3 * expected.abs().max()
        assert (ours.double() - expected).abs().max() <= allowed


@compiles
@pytest.mark.parametrize("variant", ["dinov3", "rope-mixed", "eva02-split-swiglu"])
def test_a_compiled_step_is_the_same(variant):
    model, images = build(variant), make_images()
    expected = [plain.gradients(model.target, model(images, coins=coins)) for coins in COINS]
    model.compile(backend="aot_eager", fullgraph=True)
    for coins, wanted in zip(COINS, expected, strict=True):
        for name, grad in plain.gradients(model.target, model(images, coins=coins)).items():
            tolerance = 1e-6 if name == "rope.freqs" else 1e-11
            torch.testing.assert_close(grad, wanted[name], rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("dtype", ["bfloat16", "float8"])
def test_a_source_of_three_projections_is_held_in_another_dtype(dtype):
    model, images = build("eva02-split-swiglu").float(), make_images(dtype=torch.float32)
    held = StochCA(model.target, copy.deepcopy(model.source), source_dtype=dtype).train()
    with torch.autocast("cpu", torch.bfloat16):
        expected, out = (m(images, coins=(False, True, True)) for m in (model, held))
    for part in "qkv":
        layer = held.source.blocks[1].attn.get_submodule(f"{part}_proj")
        assert (type(layer), layer.weight.dtype) == (torch.nn.Linear, torch.bfloat16)
    assert torch.equal(out, expected) if dtype == "bfloat16" else torch.isfinite(out).all()
