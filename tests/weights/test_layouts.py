"""Weights of torchvision and Hugging Face compute in timm what they compute there, and back."""

import json
import os

import pytest
import safetensors.torch
import timm
import torch
from timm.data import IMAGENET_DEFAULT_MEAN
from torchvision.models import vit_b_16

from stochca.weights import layouts
from stochca.weights.creation import create_vit
from stochca.weights.facts import norm_eps
from stochca.weights.layouts import TORCHVISION, layout_of, to_torchvision
from stochca.weights.reading import read_weights
from tests.models import perturb
from tests.weights.others import CLASSES, HUGGING_FACE, NAME, SIZES, logits, make_images, torchvision_vit


def assert_same(ours, theirs, tolerance=1e-5):
    images = make_images()
    expected = logits(theirs, images)
    assert expected.abs().max() > 0.1
    torch.testing.assert_close(logits(ours, images), expected, rtol=0, atol=tolerance)


def renamed(state, swaps):
    def rename(name):
        for old, new in swaps.items():
            name = name.replace(old, new)
        return name

    return {rename(name): tensor for name, tensor in state.items()}


# torchvision


@pytest.mark.parametrize(
    "swaps", [{}, {"mlp.0": "mlp.linear_1", "mlp.3": "mlp.linear_2"}], ids=["new", "old"]
)
@pytest.mark.parametrize("file", ["weights.pth", "weights.safetensors"])
def test_a_torchvision_file_computes_the_same_in_timm(tmp_path, file, swaps):
    theirs, path = torchvision_vit(), tmp_path / file
    state = renamed(theirs.state_dict(), swaps)
    torch.save(state, path) if file.endswith("pth") else safetensors.torch.save_file(state, path)
    weights = read_weights(path)
    assert (weights.layout, weights.num_classes, weights.left_out) == ("torchvision", CLASSES, [])
    ours = create_vit(NAME, weights, **SIZES)
    assert_same(ours, theirs)
    assert norm_eps(ours) == norm_eps(theirs) == 1e-6
    assert (
        ours.pretrained_cfg["mean"] == IMAGENET_DEFAULT_MEAN != timm.create_model(NAME).pretrained_cfg["mean"]
    )
    assert "state_dict" not in ours.pretrained_cfg


def test_timm_weights_compute_the_same_in_torchvision():
    ours = timm.create_model(NAME, num_classes=CLASSES, **SIZES)
    perturb(ours, seed=3)
    theirs = torchvision_vit()
    theirs.load_state_dict(to_torchvision(ours.state_dict()))
    assert_same(ours, theirs)


def test_all_names_of_torchvisions_vit_b_have_a_place():
    with torch.device("meta"):
        theirs = vit_b_16().state_dict()
        ours = timm.create_model("vit_base_patch16_224").state_dict()
    assert layout_of(theirs).name == "torchvision"
    state, left_out = layout_of(theirs).convert(theirs)
    assert {name: t.shape for name, t in state.items()} == {name: t.shape for name, t in ours.items()}
    assert list(to_torchvision(state)) == list(theirs)
    assert left_out == []


def test_what_timm_has_not_is_refused_by_name(tmp_path):
    path = tmp_path / "weights.pth"
    torch.save(torchvision_vit(representation_size=16).state_dict(), path)
    with pytest.raises(
        ValueError, match=r"layout of torchvision, but timm's has no place for heads.pre_logits"
    ):
        read_weights(path)


@pytest.mark.parametrize(
    "kwargs",
    [{"pre_norm": True}, {"init_values": 0.1}, {"qk_norm": True}, {"reg_tokens": 2}],
    ids=lambda kwargs: "".join(kwargs),
)
def test_what_torchvision_has_not_is_refused_by_name(kwargs):
    state = timm.create_model(NAME, **SIZES, **kwargs).state_dict()
    with pytest.raises(
        ValueError, match=r"torchvision's VisionTransformer has no place for (norm_|blocks|reg_)"
    ):
        to_torchvision(state)


def test_the_tables_name_each_tensor_once():
    newest = list(TORCHVISION.items())[:12]
    assert len({timms for _, timms in newest}) == len(newest)


# Hugging Face


@pytest.fixture(scope="module")
def hugging_face():
    os.environ["HF_HUB_OFFLINE"] = "1"
    transformers = pytest.importorskip("transformers")
    transformers.utils.logging.disable_progress_bar()
    transformers.utils.logging.set_verbosity_error()
    return transformers


def make_theirs(transformers, family="ViT", head="ForImageClassification", **changes):
    torch.manual_seed(0)
    extra = {} if family == "ViT" or family == "DeiT" else {"mlp_ratio": 4}
    config = getattr(transformers, f"{family}Config")(
        **{**HUGGING_FACE, **extra, **changes}, num_labels=CLASSES
    )
    model = getattr(transformers, f"{family}{head}")(config)
    perturb(model)
    return model


def on_disk(model, tmp_path):
    model.save_pretrained(tmp_path)
    return tmp_path / "model.safetensors"


def in_memory(model, tmp_path):
    model.save_pretrained(tmp_path)  # the config beside it
    (tmp_path / "model.safetensors").unlink()
    torch.save(model.state_dict(), tmp_path / "pytorch_model.bin")
    return tmp_path / "pytorch_model.bin"


@pytest.mark.parametrize("save", [on_disk, in_memory])
@pytest.mark.parametrize("eps", [1e-12, 1e-5])
def test_a_hugging_face_vit_computes_the_same_in_timm(hugging_face, tmp_path, save, eps):
    theirs = make_theirs(hugging_face, layer_norm_eps=eps)
    weights = read_weights(save(theirs, tmp_path))
    assert (weights.layout, weights.num_classes, weights.left_out) == ("Hugging Face", CLASSES, [])
    ours = create_vit(NAME, weights, **SIZES)
    assert norm_eps(ours) == eps
    assert_same(ours, theirs)


def test_both_layouts_of_transformers_5_are_tried(hugging_face, tmp_path):
    theirs = make_theirs(hugging_face)
    names = safetensors.torch.load_file(on_disk(theirs, tmp_path)).keys()
    assert "vit.encoder.layer.0.attention.attention.query.weight" in names
    assert names.isdisjoint(name for name in theirs.state_dict() if "layers" in name)


def test_the_epsilon_decides_the_logits(hugging_face, tmp_path):
    theirs = make_theirs(hugging_face)
    ours = create_vit(NAME, read_weights(on_disk(theirs, tmp_path)), **SIZES)
    for module in ours.modules():
        if isinstance(module, torch.nn.LayerNorm):
            module.eps = 1e-6
    with pytest.raises(AssertionError, match="not close"):
        assert_same(ours, theirs)


def test_an_epsilon_that_nothing_says_has_to_be_given(hugging_face, tmp_path):
    theirs = make_theirs(hugging_face)
    path = on_disk(theirs, tmp_path)
    (tmp_path / "config.json").unlink()
    weights = read_weights(path)
    with pytest.raises(
        ValueError, match=r"does not say the epsilon .* config.json beside it, or give --norm-eps"
    ):
        create_vit(NAME, weights, **SIZES)
    assert_same(create_vit(NAME, weights, eps=1e-12, **SIZES), theirs)


def test_an_epsilon_that_the_weights_have_not_is_refused(hugging_face, tmp_path):
    weights = read_weights(on_disk(make_theirs(hugging_face), tmp_path))
    with pytest.raises(ValueError, match=r"--norm-eps is 1e-06, but the layer norms of .* have 1e-12"):
        create_vit(NAME, weights, eps=1e-6, **SIZES)


def test_the_pooler_is_left_out_by_name_and_features_are_the_same(hugging_face, tmp_path):
    theirs = make_theirs(hugging_face, head="Model")
    weights = read_weights(on_disk(theirs, tmp_path))
    assert (weights.num_classes, sorted(weights.left_out)) == (
        0,
        ["pooler.dense.bias", "pooler.dense.weight"],
    )
    assert "left out: pooler.dense" in weights.describe()
    ours = create_vit(NAME, weights, **SIZES).eval()
    with torch.no_grad():
        expected = theirs.eval()(make_images()).last_hidden_state
        torch.testing.assert_close(ours.forward_features(make_images()), expected, rtol=0, atol=1e-5)


def test_images_and_classes_are_read_from_the_files_beside(hugging_face, tmp_path):
    theirs = make_theirs(hugging_face)
    path = on_disk(theirs, tmp_path)
    images = {"image_mean": [0.1, 0.2, 0.3], "image_std": [0.4, 0.5, 0.6]}
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(images))
    weights = read_weights(path)
    assert weights.facts.classes == [f"LABEL_{i}" for i in range(CLASSES)]
    config = create_vit(NAME, weights, **SIZES).pretrained_cfg
    assert (config["mean"], config["std"]) == ((0.1, 0.2, 0.3), (0.4, 0.5, 0.6))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_attention_heads": 6}, "heads: the model has 3, it has 6"),
        ({"hidden_act": "quick_gelu"}, "activation function: the model has GELU, it has QuickGELU"),
        ({"hidden_act": "relu"}, "hidden_act in .* must be one of gelu, .*, got relu"),
    ],
)
def test_a_model_that_its_config_says_is_another_is_refused(hugging_face, tmp_path, changes, message):
    path = on_disk(make_theirs(hugging_face, **changes), tmp_path)
    with pytest.raises(ValueError, match=message):
        create_vit(NAME, read_weights(path), **SIZES)


@pytest.mark.parametrize("save", [on_disk, in_memory])
def test_a_distilled_deit_computes_the_same_in_timm(hugging_face, tmp_path, save):
    theirs = make_theirs(hugging_face, "DeiT", "ForImageClassificationWithTeacher")
    ours = create_vit("deit_tiny_distilled_patch16_224", read_weights(save(theirs, tmp_path)), **SIZES)
    assert_same(ours, theirs)


@pytest.mark.parametrize("save", [on_disk, in_memory])
@pytest.mark.parametrize("family", ["Dinov2", "Dinov2WithRegisters"])
def test_dinov2_computes_the_same_in_timm(hugging_face, tmp_path, family, save):
    theirs = make_theirs(hugging_face, family, layerscale_value=0.5)
    weights = read_weights(save(theirs, tmp_path))
    assert weights.left_out == ["classifier.bias", "classifier.weight"][:: 1 if save is on_disk else -1]
    name = "vit_small_patch14_dinov2" if family == "Dinov2" else "vit_small_patch14_reg4_dinov2"
    ours = create_vit(name, weights, **SIZES).eval()
    assert ours.num_prefix_tokens == (1 if family == "Dinov2" else 5)
    inner = theirs.eval().base_model
    with torch.no_grad():
        expected = inner(make_images()).last_hidden_state
        torch.testing.assert_close(ours.forward_features(make_images()), expected, rtol=0, atol=1e-5)


def test_hugging_face_clip_computes_the_same_in_timm(hugging_face, tmp_path):
    vision = {**HUGGING_FACE, "layer_norm_eps": 1e-5}
    text = {name: vision[name] for name in ("num_hidden_layers", "hidden_size", "num_attention_heads")}
    config = hugging_face.CLIPConfig(
        text_config={**text, "vocab_size": 64}, vision_config=vision, projection_dim=24
    )
    theirs = hugging_face.CLIPModel(config)
    perturb(theirs)
    weights = read_weights(on_disk(theirs, tmp_path))
    assert (weights.layout, weights.num_classes) == ("Hugging Face CLIP", 24)
    assert all(name.startswith(("text_", "logit_scale")) for name in weights.left_out)
    ours = create_vit("vit_base_patch16_clip_quickgelu_224", weights, **SIZES)
    with torch.no_grad():
        vision = theirs.eval().vision_model(make_images())
        expected = theirs.visual_projection(vision.pooler_output)
    torch.testing.assert_close(logits(ours, make_images()), expected, rtol=0, atol=1e-5)
    with pytest.raises(ValueError, match="activation function: the model has GELU, it has QuickGELU"):
        create_vit("vit_base_patch16_clip_224", weights, **SIZES)


def test_queries_without_their_keys_and_values_are_named():
    state = {"blocks.0.attn.q.weight": torch.zeros(4, 4), "blocks.0.attn.k.weight": torch.zeros(4, 4)}
    with pytest.raises(ValueError, match=r"^blocks\.0\.attn\.q\.weight has no k and v beside it$"):
        layouts._joined(state)
