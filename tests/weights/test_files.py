"""Files are read whole or refused, and no code in them runs."""

import argparse
import pickle
import zipfile
from collections import OrderedDict

import numpy as np
import pytest
import safetensors.torch
import timm
import torch
from torch.torch_version import TorchVersion

from stochca.checkpoint import digest, save_weights
from stochca.cli import main
from stochca.weights.creation import create_plain, create_vit
from stochca.weights.facts import norm_eps
from stochca.weights.layouts import layout_of
from stochca.weights.reading import read_weights
from tests.models import perturb
from tests.weights.others import CLASSES, NAME, SIZES, as_jax, torchvision_vit


@pytest.fixture(scope="module")
def vit():
    model = timm.create_model(NAME, num_classes=CLASSES, **SIZES)
    perturb(model)
    return model


def write(tmp_path, state):
    path = tmp_path / "weights.pth"
    torch.save(state, path)
    return path


class Code:
    def __reduce__(self):
        return print, ("this ran",)


def test_code_in_a_file_is_refused_and_does_not_run(tmp_path, vit, capsys):
    path = write(tmp_path, {**vit.state_dict(), "extra": Code()})
    with pytest.raises(
        ValueError,
        match=r"not a complete file of weights alone: .*Unsupported global: GLOBAL .*print$",
    ):
        read_weights(path)
    assert "this ran" not in capsys.readouterr().out


@pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")
def test_a_torchscript_archive_is_refused(tmp_path):
    path = tmp_path / "ViT-B-16.pt"
    torch.jit.script(torch.nn.Linear(2, 2)).save(path)
    with pytest.raises(ValueError, match="is a TorchScript archive, which is code: save the state_dict"):
        read_weights(path)


@pytest.mark.parametrize("name", ["weights.pth", "weights.safetensors"])
def test_a_truncated_file_is_refused(tmp_path, vit, name):
    path = tmp_path / name
    if name.endswith("pth"):
        torch.save(vit.state_dict(), path)
    else:
        safetensors.torch.save_file(vit.state_dict(), path)
    whole = path.read_bytes()
    for size in (0, 7, len(whole) // 2):
        path.write_bytes(whole[:size])
        with pytest.raises(ValueError, match=r"is not a complete (file of weights alone|safetensors file)"):
            read_weights(path)
    with pytest.raises(FileNotFoundError, match=r"nowhere\.pth is not a file"):
        read_weights(tmp_path / "nowhere.pth")


def test_a_file_without_tensors_is_refused(tmp_path):
    for content in ({"epoch": 3}, {}):
        with pytest.raises(ValueError, match=r"holds no tensors, but (epoch|nothing)"):
            read_weights(write(tmp_path, content))


def test_what_training_scripts_wrap_around_weights_is_taken_off(tmp_path, vit):
    state = vit.state_dict()
    args = argparse.Namespace(lr=0.1)
    other = OrderedDict((name, torch.zeros_like(t)) for name, t in state.items())
    wrapped = OrderedDict((f"module.{name}", t) for name, t in state.items())
    for content in (
        {"state_dict": wrapped, "epoch": 3, "args": args},
        {"model": state},
        {"state_dict": other, "state_dict_ema": state},
    ):
        weights = read_weights(write(tmp_path, content))
        assert weights.layout == "timm"
        assert torch.equal(create_vit(NAME, weights, **SIZES).head.weight, vit.head.weight)


# timm is lenient as soon as the classes differ.


@pytest.mark.parametrize("num_classes", [None, CLASSES, 3, 0])
def test_weights_load_strictly_whatever_the_classes(tmp_path, vit, num_classes):
    model = create_vit(
        NAME, read_weights(write(tmp_path, vit.state_dict())), num_classes=num_classes, **SIZES
    )
    kept = num_classes in (None, CLASSES)
    assert model.num_classes == (CLASSES if kept else num_classes)
    for name, tensor in model.state_dict().items():
        if kept or not name.startswith("head."):
            assert torch.equal(tensor, vit.state_dict()[name]), name
    for change, message in (
        ({"norm.bias": None}, 'Missing key.s. in state_dict: "norm.bias"'),
        ({"norm.other": torch.ones(1)}, 'Unexpected key.s. in state_dict: "norm.other"'),
        ({"norm.bias": torch.ones(7)}, r"size mismatch for norm.bias: .*\[7\].*\[48\]"),
    ):
        state = {**vit.state_dict(), **change}
        path = write(tmp_path, {name: t for name, t in state.items() if t is not None})
        with pytest.raises(ValueError, match=f"weights.pth does not fit {NAME}: {message}") as caught:
            create_vit(NAME, read_weights(path), num_classes=num_classes, **SIZES)
        assert "\n" not in str(caught.value)


def test_filters_of_another_patch_size_are_refused(tmp_path, vit):
    path = write(tmp_path, vit.state_dict())
    with pytest.raises(ValueError, match=r"another patch size: the model has \(12, 12\), it has \(8, 8\)"):
        create_vit(NAME, read_weights(path), **{**SIZES, "patch_size": 12})


def test_position_embeddings_of_others_are_resampled_as_timms(tmp_path, vit):
    own = read_weights(write(tmp_path, vit.state_dict()))
    expected = create_vit(NAME, own, **{**SIZES, "img_size": 40}).pos_embed
    theirs = torchvision_vit()
    with torch.no_grad():
        theirs.encoder.pos_embedding.copy_(vit.pos_embed)
    weights = read_weights(write(tmp_path, theirs.state_dict()))
    assert torch.equal(create_vit(NAME, weights, **{**SIZES, "img_size": 40}).pos_embed, expected)
    assert expected.shape == (1, 26, 48)


def test_an_error_of_the_model_is_timms_own(tmp_path, vit):
    weights = read_weights(write(tmp_path, vit.state_dict()))
    with pytest.raises(TypeError, match="unexpected keyword argument 'dept'"):
        create_vit(NAME, weights, dept=2)


def test_the_normalisation_of_timms_own_config_beside_a_file_is_used(tmp_path, vit):
    path = write(tmp_path, vit.state_dict())
    (tmp_path / "config.json").write_text(
        '{"pretrained_cfg": {"mean": [0.1, 0.2, 0.3], "std": [0.4, 0.5, 0.6]}}'
    )
    assert create_vit(NAME, read_weights(path), **SIZES).pretrained_cfg["mean"] == (0.1, 0.2, 0.3)
    for content, message in (("{", "is no JSON"), ("[1]", "must hold a JSON object, got")):
        (tmp_path / "config.json").write_text(content)
        with pytest.raises(ValueError, match=message):
            read_weights(path)


def test_layouts_are_told_by_their_names(vit):
    trunk = {f"visual.trunk.{name}": t for name, t in vit.state_dict().items()}
    assert layout_of(trunk).name == "open_clip"
    assert layout_of(vit.state_dict()).name == "timm"
    assert layout_of(torchvision_vit().state_dict()).name == "torchvision"


def test_a_model_is_built_again_with_its_epsilon():
    description = {"model": NAME, "model_kwargs": {**SIZES, "num_classes": 3}}
    assert norm_eps(create_plain({**description, "norm_eps": 1e-12})) == 1e-12
    assert norm_eps(create_plain({**description, "norm_eps": None})) == 1e-6
    assert norm_eps(create_plain(description)) == 1e-6


def test_a_file_of_ours_that_has_changed_is_refused_and_stays_one_of_timm(tmp_path, vit):
    path = tmp_path / "weights.safetensors"
    save_weights(path, vit.state_dict(), {"model": NAME})
    assert digest(timm.create_model(NAME, num_classes=CLASSES, checkpoint_path=str(path), **SIZES)) == digest(
        vit
    )
    whole = bytearray(path.read_bytes())
    whole[-1] ^= 1
    path.write_bytes(whole)
    with pytest.raises(ValueError, match=r"weights.safetensors is damaged: its sha256 is .* it says"):
        read_weights(path)


def test_an_archive_written_without_sums_is_read(tmp_path, vit):
    torch.serialization.set_crc32_options(False)
    try:
        path = write(tmp_path, vit.state_dict())
    finally:
        torch.serialization.set_crc32_options(True)
    assert read_weights(path).layout == "timm"


def test_a_compressed_archive_is_refused(tmp_path):
    path = tmp_path / "weights.pth"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("archive/data.pkl", bytes(10_000_000))
    with pytest.raises(ValueError, match=r"is a compressed archive, which torch.save does not write"):
        read_weights(path)


def test_a_pickle_is_refused_where_torch_is_too_old_to_read_it_safely(tmp_path, vit, monkeypatch):
    path = write(tmp_path, vit.state_dict())
    monkeypatch.setattr(torch, "__version__", TorchVersion("2.9.1+cu128"))
    with pytest.raises(
        ValueError, match=r"is a pickle, which torch before 2.10 does not read .* torch 2.9.1"
    ):
        read_weights(path)
    save_weights(tmp_path / "weights.safetensors", vit.state_dict(), {})
    assert read_weights(tmp_path / "weights.safetensors").layout == "timm"


@pytest.mark.parametrize("name", ["checkpoint_path", "pretrained", "pretrained_cfg_overlay"])
def test_a_checkpoint_cannot_have_other_files_loaded(name):
    description = {"model": NAME, "model_kwargs": {**SIZES, name: "other.pth"}}
    with pytest.raises(ValueError, match=f"must not load other files, got {name}"):
        create_plain(description)


def test_jax_weights_load_whole_or_not_at_all(tmp_path, vit):
    arrays = as_jax(vit.state_dict())
    path = tmp_path / "weights.npz"

    def load(num_classes=CLASSES, **changes):
        np.savez(path, **{key: a for key, a in {**arrays, **changes}.items() if a is not None})
        return create_vit(NAME, read_weights(path), num_classes=num_classes, **SIZES)

    assert digest(load()) == digest(vit)
    bias = "Transformer/encoderblock_0/MlpBlock_3/Dense_0/bias"
    # timm would fill the row with the one number, and the head at random.
    with pytest.raises(ValueError, match=r"does not fit .* it has .* numbers, the model has"):
        load(**{bias: np.ones(1, np.float32)})
    with pytest.raises(ValueError, match=r"does not fit .* it has no head"):
        load(None, **{"head/bias": None})
    with pytest.raises(ValueError, match=f"does not fit .*{bias}"):
        load(**{bias: None})
    with pytest.raises(ValueError, match=r"blocks.0.mlp.fc1.bias holds 192 values that are not finite"):
        load(**{bias: np.full(192, np.nan, np.float32)})


def test_the_command_has_no_pickle_run_whoever_reads_it(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("TORCH_FORCE_WEIGHTS_ONLY_LOAD", "0")
    path = write(tmp_path, {"extra": Code()})
    torch.load(path, weights_only=False)
    assert "this ran" in capsys.readouterr().out
    assert main(["info", "--device", "cpu"]) == 0
    with pytest.raises(pickle.UnpicklingError):
        torch.load(path, weights_only=False)
    assert "this ran" not in capsys.readouterr().out
