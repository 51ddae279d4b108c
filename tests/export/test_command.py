"""`stochca export` of a run."""

import copy
import dataclasses
import json

import pytest
import timm
import torch

from stochca.checkpoint import save_weights
from stochca.cli import main
from stochca.config import FinetuneOptions, flag
from stochca.evaluation import rebuild
from stochca.export.options import ExportOptions
from stochca.train import finetune
from tests.export.test_hub import Hub
from tests.models import perturb
from tests.train.image_folder import TINY, write_images

PREPARED = {
    "mean": [0.1, 0.2, 0.3],
    "std": [0.5, 0.6, 0.7],
    "interpolation": "bilinear",
    "crop_mode": "squash",
}


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run of one epoch, whose last weights were changed."""
    root = tmp_path_factory.mktemp("run")
    images = write_images(root / "images", {"train": 4, "validation": 2})
    options = FinetuneOptions(
        model="vit_tiny_patch16_224",
        pretrained=False,
        img_size=32,
        model_kwargs=TINY,
        data_dir=str(images),
        batch_size=4,
        epochs=1,
        **PREPARED,
        workers=0,
        device="cpu",
        output=str(root / "run"),
    )
    finetune(options)
    path = root / "run" / "last.safetensors"
    model, metadata = rebuild(path)
    perturb(model)
    save_weights(path, model.state_dict(), metadata)
    return root / "run"


@torch.no_grad()
def logits_of(model):
    return copy.deepcopy(model).eval()(torch.linspace(-1, 1, 2 * 3 * 32 * 32).view(2, 3, 32, 32))


def load(folder):
    return timm.create_model(f"local-dir:{folder}", pretrained=True)


def test_a_run_becomes_a_model_of_timm_and_programs(run, tmp_path, capsys):
    output = tmp_path / "out"
    assert main(["export", str(run), "--output", str(output), "--formats", "timm", "torch-export"]) == 0
    printed = capsys.readouterr().out
    assert printed.startswith(
        f"{run}/best.safetensors is in {output}: README.md, config.json, model.pt2, model.safetensors\n"
    )
    assert "torch-export computes the model's logits, within " in printed
    model, metadata = rebuild(run / "best.safetensors")
    loaded = load(output)
    assert torch.equal(logits_of(loaded), logits_of(model))
    assert loaded.pretrained_cfg["label_names"] == ["ant", "bee", "cow"]
    config = json.loads(json.dumps(timm.data.resolve_model_data_config(loaded)))
    assert config == metadata["data_config"]
    assert {**config, **PREPARED} == config
    card = (output / "README.md").read_text()
    assert f"- **Optimizer steps:** {metadata['step']}\n" in card
    assert f"top-1 {metadata['metrics']['top1']:.2f} %" in card


@pytest.mark.parametrize("arguments", [["run", "--which", "last"], ["run/last.safetensors"]], ids=len)
def test_the_last_weights_are_exported_by_name_or_by_file(run, tmp_path, arguments):
    path, *rest = arguments
    assert main(["export", str(run.parent / path), *rest, "--output", str(tmp_path / "out")]) == 0
    last, _ = rebuild(run / "last.safetensors")
    best, _ = rebuild(run / "best.safetensors")
    assert torch.equal(logits_of(load(tmp_path / "out")), logits_of(last))
    assert not torch.equal(logits_of(best), logits_of(last))


def test_a_run_is_published(run, tmp_path, monkeypatch, capsys):
    hub = Hub(tmp_path / "hub")
    monkeypatch.setattr("timm.models._hub.HfApi", hub)
    monkeypatch.setenv("HF_TOKEN", "hf_of_nobody")
    arguments = ["--push-to-hub", "zoo/ants", "--private", "--license", "mit"]
    assert main(["export", str(run), "--output", str(tmp_path / "out"), *arguments]) == 0
    assert "published: https://hub/zoo/ants/commit/1\n" in capsys.readouterr().out
    assert hub.made == [("zoo/ants", True, True)]
    assert "license: mit" in (hub.folder / "README.md").read_text()
    assert torch.equal(logits_of(load(hub.folder)), logits_of(load(tmp_path / "out")))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["/nowhere"], "there is no checkpoint /nowhere"),
        (["{run}", "--which", "swad"], "there is no checkpoint {run}/swad.safetensors"),
        (["{run}/best.safetensors", "--which", "last"], "--which is for the folder of a run"),
        (["{run}", "--output", "{run}"], "{run} is not empty (best.safetensors, config.yaml, "),
        (["{run}", "--tolerance", "-1"], "--tolerance must be at least 0, got -1.0"),
        (["{run}", "--formats", "onnx", "onnx"], "--formats must be different values, at least one"),
        (["{run}", "--private"], "--private is for --push-to-hub"),
        (["{run}", "--push-to-hub", "ants"], "must be named OWNER/NAME, got 'ants'"),
    ],
    ids=lambda value: "-".join(value[1:]) if isinstance(value, list) else "",
)
def test_what_the_user_can_mend_is_one_line_and_code_2(
    run, tmp_path, monkeypatch, capsys, arguments, message
):
    monkeypatch.chdir(tmp_path)
    assert main(["export", *(argument.format(run=run) for argument in arguments)]) == 2
    errors = capsys.readouterr().err
    assert errors.startswith("stochca export: ")
    assert message.format(run=run) in errors
    assert errors.count("\n") == 1
    assert not [*tmp_path.iterdir()]


def test_every_option_has_a_flag_and_a_line_of_help(capsys):
    with pytest.raises(SystemExit):
        main(["export", "--help"])
    shown = capsys.readouterr().out
    for field in dataclasses.fields(ExportOptions):
        assert (field.name if field.name == "checkpoint" else flag(field.name)) in shown
        assert field.metadata["help"].split()[0] in shown
