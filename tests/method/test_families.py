"""Every timm model of the blocks and attention that StochCA drives is driven; others are refused by name."""

import pytest
import timm
import torch
from timm.data import resolve_model_data_config

from stochca import StochCA
from stochca.vit import num_class_rows
from tests.architectures import MODULES, REFUSED, module_of, outline, without_memory
from tests.models import make_images, make_model, make_target

DRIVEN = {("Block", "Attention"), ("EvaBlock", "EvaAttention"), ("EvaBlock", "AttentionRope")}
CANDIDATES = [name for name in timm.list_models() if module_of(name) in MODULES]


def expected_refusal(model):
    block = type(model.blocks[0]).__name__
    attention = type(getattr(model.blocks[0], "attn", None)).__name__
    if (block, attention) in DRIVEN:
        return None
    return attention if block in ("Block", "EvaBlock") else block


@pytest.mark.parametrize("name", CANDIDATES)
def test_each_architecture_is_driven_or_refused_by_name(name):
    model = outline(name)
    attention = getattr(model.blocks[0], "attn", None)
    refusal = expected_refusal(model)
    if refusal is not None:
        with pytest.raises(TypeError, match=f"{type(model).__name__}.*{refusal}"):
            StochCA(model)
    elif attention.proj.in_features // attention.num_heads % 8:
        with pytest.raises(ValueError, match="head size must be 16 to 128 in steps of 8, got 76"):
            StochCA(model)
    else:
        stochca = StochCA(model).train()
        assert len(stochca.source.blocks) == len(model.blocks) == stochca.coins.depth
        assert num_class_rows(model) == (
            None if model.global_pool != "token" else 2 if "distilled" in name else 1
        )
        assert name not in REFUSED


@pytest.mark.parametrize(
    ("name", "kwargs", "reason"),
    [
        ("resnet18", {}, "got ResNet"),
        ("swin_tiny_patch4_window7_224", {"depths": (1, 1, 1, 1)}, "got SwinTransformer"),
        ("beit_base_patch16_224", {"depth": 1}, "got Beit"),
        ("xcit_nano_12_p16_224", {"depth": 1}, "got Xcit"),
        ("vit_relpos_small_patch16_224", {"depth": 1}, "got VisionTransformerRelPos"),
        ("samvit_base_patch16", {"depth": 1, "global_attn_indexes": ()}, "got VisionTransformerSAM"),
    ],
)
def test_other_families_are_refused_by_name(name, kwargs, reason):
    with pytest.raises(TypeError, match=reason):
        StochCA(timm.create_model(name, **kwargs))


@pytest.mark.parametrize(
    ("kwargs", "error", "message"),
    [
        ({"patch_drop_rate": 0.1}, ValueError, "patch dropout.*Use patch_drop_rate=0"),
        ({"embed_dim": 24, "num_heads": 3}, ValueError, "head size must be 16 to 128.*got 8"),
        ({"embed_dim": 60, "num_heads": 3}, ValueError, "head size must be 16 to 128 in steps of 8, got 20"),
    ],
)
def test_parts_that_cannot_be_driven_are_refused(kwargs, error, message):
    with pytest.raises(error, match=message):
        StochCA(make_target(**kwargs))


def test_a_replaced_projection_is_refused():
    target = make_target()
    target.blocks[2].attn.qkv = torch.nn.Sequential(target.blocks[2].attn.qkv)
    with pytest.raises(TypeError, match="attention 2: its qkv is a Sequential"):
        StochCA(target)


def test_a_forward_of_its_own_is_refused():
    target = make_target()
    target.__class__ = type("MyViT", (type(target),), {"forward_features": lambda self, x: x})
    with pytest.raises(TypeError, match="MyViT has a forward_features of its own"):
        StochCA(target)


@pytest.mark.parametrize(
    ("kwargs", "difference"),
    [
        ({"depth": 3}, "depth: target 4, source 3"),
        ({"embed_dim": 96}, "width: target 48, source 96"),
        ({"num_heads": 1}, "heads: target 3, source 1"),
        ({"qk_norm": True}, "norm of keys: target Identity, source LayerNorm"),
        ({"norm_layer": "rmsnorm"}, "norm: target LayerNorm, source RmsNorm"),
        (
            {"class_token": False, "reg_tokens": 1, "global_pool": "avg"},
            "class token: target True, source False",
        ),
        ({"in_chans": 1}, "input channels: target 3, source 1"),
        ({"reg_tokens": 2}, "prefix tokens: target 1, source 3"),
        ({"patch_size": 4}, r"patch size: target \(8, 8\), source \(4, 4\)"),
        ({"pre_norm": True}, "norm before the blocks: target Identity, source LayerNorm"),
    ],
)
def test_a_source_of_another_architecture_is_refused(kwargs, difference):
    with pytest.raises(ValueError, match=difference):
        StochCA(make_target(), make_target(**kwargs))


def test_a_source_with_one_other_block_is_refused():
    source = make_target()
    source.blocks[2] = make_target(qk_norm=True).blocks[2]
    with pytest.raises(ValueError, match=r"norm of keys: target Identity, source .*LayerNorm"):
        StochCA(make_target(), source)


def test_a_normalisation_of_other_channels_is_refused():
    target, source = make_target(in_chans=1), make_target(in_chans=1)
    source.pretrained_cfg = {**source.pretrained_cfg, "mean": (0.1, 0.2, 0.3)}
    with pytest.raises(ValueError, match="for each of the 1 input channels"):
        StochCA(target, source)


def test_an_unknown_implementation_is_refused_at_once():
    with pytest.raises(ValueError, match="impl must be one of"):
        StochCA(make_target(), impl="magic")


def test_what_training_cannot_take_is_refused():
    model = make_model()
    with pytest.raises(TypeError, match="takes no attn_mask in training"):
        model(make_images(), attn_mask=torch.zeros(10, 10))
    with pytest.raises(TypeError, match=r"images must be a tensor .* got dict"):
        model({"patches": make_images()})
    mask = torch.zeros(10, 10, dtype=torch.float64)
    assert torch.equal(
        model.eval()(make_images(), attn_mask=mask), model.target(make_images(), attn_mask=mask)
    )


def test_timms_data_functions_read_the_targets_configuration():
    with without_memory():
        model = StochCA.from_timm("vit_base_patch16_siglip_384", pretrained=False)
    assert resolve_model_data_config(model) == resolve_model_data_config(model.target)
    assert resolve_model_data_config(model)["input_size"] == (3, 384, 384)
    assert (model.num_classes, model.num_features) == (model.target.num_classes, 768)


def test_a_source_that_is_the_target_is_refused():
    target = make_target()
    with pytest.raises(ValueError, match="source is the target itself"):
        StochCA(target, target)


def test_the_source_is_a_frozen_copy_of_the_target_as_it_was():
    target = make_target()
    before = {name: p.detach().clone() for name, p in target.named_parameters()}
    model = StochCA(target)
    with torch.no_grad():
        for p in target.parameters():
            p.zero_()
    for name, p in model.source.named_parameters():
        assert torch.equal(p, before[name])


def test_from_timm_passes_options_on():
    model = StochCA.from_timm(
        "vit_tiny_patch16_224", pretrained=False, p=0.3, seed=7, per="sample", num_classes=4, img_size=32,
        patch_size=8, depth=2, drop_path_rate=0.2,
    )  # fmt: skip
    assert model.target.num_classes == 4
    assert (model.coins.p, model.coins.seed, model.coins.per) == (0.3, 7, "sample")
    assert model.target.blocks[1].drop_path1.drop_prob == pytest.approx(0.2)
    assert model.eval()(make_images(dtype=torch.float32, size=32)).shape == (2, 4)
    with pytest.raises(RuntimeError, match="Unknown model"):
        StochCA.from_timm("no_such_model", pretrained=False)


def test_images_of_another_rank_are_refused():
    with pytest.raises(ValueError, match=r"images must have shape \(B, C, H, W\), got \(3, 24, 24\)"):
        make_model()(make_images()[0])
