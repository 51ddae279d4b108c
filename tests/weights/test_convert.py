"""`stochca convert` writes what timm, stochca and torchvision load."""

import json

import pytest
import safetensors.torch
import timm
import torch

pytest.importorskip("jsonargparse")

from stochca.checkpoint import read_metadata
from stochca.cli import main
from stochca.evaluation import rebuild
from stochca.train import Trainer
from stochca.weights.facts import norm_eps
from stochca.weights.reading import read_weights
from tests.models import perturb
from tests.weights.others import CLASSES, NAME, SIZES, logits, make_images, torchvision_vit


@pytest.fixture
def theirs(tmp_path):
    model = torchvision_vit()
    torch.save(model.state_dict(), tmp_path / "torchvision.pth")
    return model


def convert(path, output, *arguments):
    kwargs = json.dumps({name: value for name, value in SIZES.items() if name != "img_size"})
    model = ["--model", NAME, "--img-size", str(SIZES["img_size"]), "--model-kwargs", kwargs]
    return main(["convert", str(path), "--output", str(output), *model, *arguments])


def test_torchvision_to_timm_and_back_has_the_same_bits(tmp_path, theirs, capsys):
    ours, back = tmp_path / "timm.safetensors", tmp_path / "back.pth"
    assert convert(tmp_path / "torchvision.pth", ours) == 0
    shown = capsys.readouterr().out
    assert "weights in the layout of torchvision" in shown
    assert f"{NAME} with {CLASSES} classes, and 1e-06 as the epsilon of its layer norms: {ours}" in shown
    plain = timm.create_model(NAME, checkpoint_path=str(ours), num_classes=CLASSES, **SIZES)
    torch.testing.assert_close(logits(plain, make_images()), logits(theirs, make_images()), rtol=0, atol=1e-5)
    # A checkpoint of ours says of which model it is.
    assert main(["convert", str(ours), "--to", "torchvision", "--output", str(back)]) == 0
    state = torch.load(back)
    assert state.keys() == theirs.state_dict().keys()
    assert all(torch.equal(tensor, theirs.state_dict()[name]) for name, tensor in state.items())


def test_what_is_converted_is_evaluated_and_fine_tuned_as_it_is(
    tmp_path, theirs, folder, make_options, capsys
):
    path = tmp_path / "timm.safetensors"
    torch.save(torchvision_vit(num_classes=2).state_dict(), tmp_path / "torchvision.pth")
    convert(tmp_path / "torchvision.pth", path)
    metadata = read_metadata(path)
    assert (metadata["model"], metadata["num_classes"], metadata["classes"]) == (NAME, 2, None)
    assert metadata["converted_from"] == "torchvision"
    capsys.readouterr()
    arguments = [
        "evaluate",
        str(path),
        "--data-dir",
        str(folder),
        "--workers",
        "0",
        "--device",
        "cpu",
        "--json",
    ]
    assert main(arguments) == 0
    assert json.loads(capsys.readouterr().out)["images"] == 8
    of_theirs = Trainer(make_options(tmp_path / "torchvision.pth", output=str(tmp_path / "a")))
    of_ours = Trainer(make_options(path, output=str(tmp_path / "b")))
    assert of_theirs.source_digest == of_ours.source_digest
    assert of_theirs.data_config["mean"] == of_ours.data_config["mean"] == (0.485, 0.456, 0.406)


def test_the_epsilon_goes_with_the_weights_through_a_run(tmp_path, theirs, make_options):
    path, state = tmp_path / "own.safetensors", {}
    own = timm.create_model(NAME, num_classes=CLASSES, **SIZES)
    torch.save(own.state_dict(), tmp_path / "own.pth")
    convert(tmp_path / "own.pth", path, "--norm-eps", "1e-12")
    state = read_weights(path)
    assert (state.layout, state.facts.norm_eps) == ("timm", 1e-12)
    trainer = Trainer(make_options(path))
    assert norm_eps(trainer.model.target) == norm_eps(trainer.model.source) == 1e-12
    trainer.run()
    model, metadata = rebuild(trainer.output / "best.safetensors")
    assert norm_eps(model) == metadata["norm_eps"] == 1e-12
    assert main(["convert", str(path), "--to", "torchvision", "--output", str(tmp_path / "x.pth")]) == 2


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"global_pool": "avg", "fc_norm": False}, "has pooling: wanted token, the model has avg"),
        (
            {"no_embed_class": True},
            "position embedding for the class token: wanted True, the model has False",
        ),
        ({"act_layer": "quick_gelu"}, "activation functions: wanted GELU, the model has QuickGELU"),
        ({"num_classes": 0}, "a classifier: wanted True, the model has False"),
        (
            {"init_values": 0.1},
            "no place for blocks.0.ls1.gamma, blocks.0.ls2.gamma, blocks.1.ls1.gamma and 1 more",
        ),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
def test_what_torchvision_cannot_compute_is_refused_in_one_line(tmp_path, capsys, kwargs, message):
    model = timm.create_model(NAME, **SIZES, **kwargs)
    perturb(model)
    path, output = tmp_path / "timm.pth", tmp_path / "out" / "torchvision.pth"
    torch.save(model.state_dict(), path)
    kwargs = {
        name: value for name, value in {**SIZES, **kwargs}.items() if name not in ("img_size", "num_classes")
    }
    arguments = ["--img-size", "24", "--model-kwargs", json.dumps(kwargs), "--model", NAME]
    assert main(["convert", str(path), "--to", "torchvision", "--output", str(output), *arguments]) == 2
    errors = capsys.readouterr().err
    assert message in errors
    assert errors.count("\n") == 1
    assert not output.exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--output", "{}/torchvision.pth", "--to", "torchvision"], "torchvision.pth is there already"),
        (["--output", "{}/x.safetensors"], "--model is missing: "),
        (["--output", "{}/x.pth"], "--output must end in .safetensors, got "),
        (["--output", "{}/x.txt", "--to", "torchvision"], "must end in .safetensors or .pth, got "),
        (["--output", "{}/x.safetensors", "--norm-eps", "0"], "--norm-eps must be positive, got 0"),
        (["--output", "{}/x.safetensors", "--img-size", "0"], "--img-size must be at least 1, got 0"),
        (["--output", "{}/x.safetensors", "--model", "vit_of_nobody"], "Unknown model"),
    ],
)
def test_what_the_user_can_mend_is_one_line_and_code_2(tmp_path, theirs, capsys, arguments, message):
    arguments = [argument.format(tmp_path) for argument in arguments]
    assert main(["convert", str(tmp_path / "torchvision.pth"), *arguments]) == 2
    errors = capsys.readouterr().err
    assert message in errors
    assert errors.count("\n") == 1


def test_a_safetensors_file_for_torchvision_is_loaded_strictly(tmp_path, theirs):
    output = tmp_path / "back.safetensors"
    assert convert(tmp_path / "torchvision.pth", output, "--to", "torchvision") == 0
    again = torchvision_vit()
    again.load_state_dict(safetensors.torch.load_file(output))
    assert torch.equal(logits(again, make_images()), logits(theirs, make_images()))
