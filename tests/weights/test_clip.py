"""CLIP's image tower, with and without its projection before the classifier."""

import json

import pytest
import timm
import torch
from timm.data import OPENAI_CLIP_MEAN
from torch import nn

from stochca.checkpoint import load_state
from stochca.config import EvaluateOptions
from stochca.evaluation import evaluate_checkpoint, rebuild
from stochca.train import Trainer
from stochca.weights.creation import create_vit
from stochca.weights.projection import classify_after_projection, with_plain_head
from stochca.weights.reading import read_weights
from tests.weights.others import CLIP_NAME, SIZES, logits, make_images, openai_features, openai_state

GELU_NAME = "vit_base_patch16_clip_224"


@pytest.fixture
def openai(tmp_path):
    path = tmp_path / "clip.pth"
    torch.save(openai_state(), path)
    return path


def test_an_openai_file_computes_the_same_in_timm(openai):
    weights = read_weights(openai)
    assert (weights.layout, weights.num_classes) == ("OpenAI CLIP", 24)
    assert set(weights.left_out) == {name for name in openai_state() if not name.startswith("visual.")}
    model = create_vit(CLIP_NAME, weights, **SIZES)
    expected = openai_features(openai_state(), make_images())
    torch.testing.assert_close(logits(model, make_images()), expected, rtol=1e-5, atol=1e-5)
    assert model.pretrained_cfg["mean"] == OPENAI_CLIP_MEAN


def test_openai_weights_are_refused_without_quickgelu(openai):
    with pytest.raises(ValueError, match="activation function: the model has GELU, it has QuickGELU"):
        create_vit(GELU_NAME, read_weights(openai), **SIZES)


def test_timms_own_quickgelu_weights_are_refused_in_the_variant_without_it(tmp_path):
    path = tmp_path / "timm.pth"
    torch.save(timm.create_model(CLIP_NAME, num_classes=512, **SIZES).state_dict(), path)
    instead_of_the_hub = {"pretrained_cfg_overlay": {"file": str(path)}}
    create_vit(CLIP_NAME, **SIZES, **instead_of_the_hub)
    with pytest.raises(ValueError, match=f"trained with QuickGELU, the model has GELU: take {CLIP_NAME}$"):
        create_vit(f"{GELU_NAME}.openai", **SIZES, **instead_of_the_hub)
    create_vit(f"{GELU_NAME}.laion2b", **SIZES, **instead_of_the_hub)
    create_vit(f"{GELU_NAME}.openai", pretrained=False, **SIZES)


def test_a_file_that_does_not_say_it_is_said_not_to(tmp_path):
    path = tmp_path / "clip.pth"
    torch.save(openai_state(is_openai=False), path)
    assert (
        "does not say whether its activation functions are GELU or QuickGELU" in read_weights(path).describe()
    )
    for name in (CLIP_NAME, GELU_NAME):
        create_vit(name, read_weights(path), **SIZES)


@pytest.mark.parametrize("is_quick", [True, False])
def test_the_config_of_open_clip_says_it(tmp_path, is_quick):
    path = tmp_path / "clip.pth"
    torch.save(openai_state(is_openai=False), path)
    config = {"model_cfg": {"quick_gelu": is_quick}, "preprocess_cfg": {"mean": [0.1, 0.2, 0.3]}}
    (tmp_path / "open_clip_config.json").write_text(json.dumps(config))
    right, wrong = (CLIP_NAME, GELU_NAME) if is_quick else (GELU_NAME, CLIP_NAME)
    weights = read_weights(path)
    assert "GELU" not in weights.describe()
    assert create_vit(right, weights, **SIZES).pretrained_cfg["mean"] == (0.1, 0.2, 0.3)
    with pytest.raises(ValueError, match="activation function"):
        create_vit(wrong, weights, **SIZES)


def test_a_timm_tower_of_open_clip_loads_with_its_projection(tmp_path):
    tower = timm.create_model(GELU_NAME, num_classes=24, **SIZES)
    state = {f"visual.trunk.{n}": t for n, t in tower.state_dict().items() if not n.startswith("head.")}
    path = tmp_path / "clip.pth"
    torch.save({**state, "visual.head.proj.weight": tower.head.weight, "text.x": torch.ones(1)}, path)
    weights = read_weights(path)
    assert (weights.layout, weights.left_out, weights.num_classes) == ("open_clip", ["text.x"], 24)
    model = create_vit(GELU_NAME, weights, **SIZES)
    assert torch.equal(logits(model, make_images()), logits(tower, make_images()))


# The classifier after the projection


def clip_options(make_options, openai, **changes):
    return make_options(openai, model=CLIP_NAME, clip_projection=True, **changes)


def test_the_classifier_reads_the_projected_features(openai):
    model = create_vit(CLIP_NAME, read_weights(openai), **SIZES)
    classify_after_projection(model, 3)
    with torch.no_grad():
        model.head.bias.add_(torch.randn(3))
        features = model.eval().forward_head(model.forward_features(make_images()), pre_logits=True)
    expected = openai_features(openai_state(), make_images())
    torch.testing.assert_close(features, expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(logits(model, make_images()), model.head(features).detach())
    plain = timm.create_model(CLIP_NAME, num_classes=3, **SIZES)
    plain.load_state_dict(with_plain_head(model.state_dict()))
    torch.testing.assert_close(
        logits(plain, make_images()), logits(model, make_images()), rtol=1e-5, atol=1e-5
    )


def test_a_state_without_a_projection_stays_as_it_is():
    for kwargs in ({}, {"global_pool": "avg", "fc_norm": True}):
        state = timm.create_model(GELU_NAME, num_classes=3, **SIZES, **kwargs).state_dict()
        assert all(plain is state[name] for name, plain in with_plain_head(state).items())
        assert with_plain_head(state).keys() == state.keys()


def test_a_run_trains_the_projection_and_writes_plain_timm_weights(make_options, openai, folder):
    trainer = Trainer(clip_options(make_options, openai, head_lr_mult=3.0))
    before = trainer.model.target.fc_norm.weight.detach().clone()
    assert torch.equal(trainer.model.source.fc_norm.weight, before)
    assert torch.equal(before, openai_state()["visual.proj"].T)
    groups = {id(p): group["lr_scale"] for group in trainer.optimizer.param_groups for p in group["params"]}
    target = trainer.model.target
    assert (groups[id(target.head.weight)], groups[id(target.fc_norm.weight)]) == (3.0, 1.0)
    summary = trainer.run()
    assert (target.fc_norm.weight - before).abs().max() > 1e-4
    model, metadata = rebuild(trainer.output / "last.safetensors")
    assert type(model.head) is nn.Linear
    assert model.head.in_features == 48
    assert isinstance(model.fc_norm, nn.Identity)
    assert metadata["data_config"]["mean"] == list(OPENAI_CLIP_MEAN)
    torch.testing.assert_close(
        logits(model, make_images()), logits(target, make_images()), rtol=1e-4, atol=1e-4
    )
    options = EvaluateOptions(
        checkpoint=str(trainer.output / "best.safetensors"), data_dir=str(folder), workers=0, device="cpu"
    )
    assert evaluate_checkpoint(options)["top1"] == pytest.approx(summary["best_top1"])


def test_averages_of_a_run_with_a_projection_are_plain_timm_weights(make_options, openai):
    averages = {
        "swad": True,
        "swad_converge": 1,
        "swad_tolerance": 1,
        "model_ema": True,
        "model_ema_decay": 0.5,
    }
    trainer = Trainer(clip_options(make_options, openai, **averages))
    assert trainer.run()["swad_steps"] is not None
    rebuild(trainer.output / "swad.safetensors")
    average, _ = rebuild(trainer.output / "last.safetensors")
    expected = logits(trainer.average.module, make_images())
    torch.testing.assert_close(logits(average, make_images()), expected, rtol=1e-4, atol=1e-4)


def test_a_run_with_a_projection_is_resumed(make_options, openai):
    options = clip_options(make_options, openai)
    first = Trainer(options)
    first.run()
    again = Trainer(clip_options(make_options, openai, resume=options.output))
    assert again.step == 4
    for name, tensor in load_state(first.output / "trainer_state.pt")["model"].items():
        assert torch.equal(again.model.target.state_dict()[name], tensor)


def test_without_it_the_projection_is_dropped_as_timm_does(make_options, openai):
    target = Trainer(make_options(openai, model=CLIP_NAME)).model.target
    assert (type(target.fc_norm), target.head.in_features) == (nn.Identity, 48)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"losses": ["distillation"]}, "leaves the source no classifier"),
        ({"pretrained": False, "pretrained_path": None}, "--clip-projection needs pretrained weights"),
    ],
)
def test_options_that_the_projection_does_not_go_with_are_refused(make_options, openai, changes, message):
    with pytest.raises(ValueError, match=message):
        Trainer(clip_options(make_options, openai, **changes))


def test_weights_without_a_projection_are_refused(make_options, tmp_path):
    model = timm.create_model("vit_tiny_patch16_224", num_classes=7, **SIZES)
    for bias, message in ((1.0, "this head has one"), (None, "no such head")):
        if bias is None:
            model.reset_classifier(0)
        else:
            nn.init.constant_(model.head.bias, bias)
        torch.save(model.state_dict(), tmp_path / "vit.pth")
        with pytest.raises(ValueError, match=message):
            Trainer(make_options(tmp_path / "vit.pth", clip_projection=True))
