"""What others load with timm alone."""

import copy
import re

import pytest
import timm
import torch

from stochca import StochCA, StochCAAttention
from stochca.export.model import export_model
from stochca.weights.facts import set_norm_eps
from tests.export.processes import IN_TIMM, read_logits, run_elsewhere, write_images
from tests.models import make_images, make_target

CLASSES = ["ant", "bee", "cow", "dog", "elk"]

# As of `stochca finetune`: nothing of it is what a model's pretrained_cfg says.
PREPARED = {
    "mean": (0.1, 0.2, 0.3),
    "std": (0.5, 0.6, 0.7),
    "interpolation": "bilinear",
    "crop_pct": 0.75,
    "crop_mode": "squash",
}
GRAY = {**PREPARED, "mean": (0.4,), "std": (0.2,)}

MODELS = {
    "class token": {},
    "norms of queries and keys": {"qk_norm": True},
    "attention pooling": {"name": "vit_base_patch16_siglip_224"},
    "two heads": {"name": "deit_tiny_distilled_patch16_224"},
    "larger images": {"img_size": 40},
    "gray images": {"in_chans": 1},
    "JAX weights": {"name": "vit_base_patch16_224.orig_in21k"},
    "images of any size": {"name": "vit_base_patch32_clip_224.openai", "dynamic_img_size": True},
    "rotary and SwiGLU": {"name": "eva02_tiny_patch14_224"},
    "rotary and registers": {"name": "vit_small_patch16_dinov3"},
    "StochCAAttention": {"attn_layer": StochCAAttention},
}


def target_of(name):
    return make_target(**{"name": "vit_tiny_patch16_224", "dtype": torch.float32, **MODELS[name]})


def images_of(name):
    options = MODELS[name]
    images = make_images(3, torch.float32, options.get("img_size", 24))
    return images[:, : options.get("in_chans", 3)]


def data_config_of(name):
    return GRAY if name == "gray images" else PREPARED


@torch.no_grad()
def logits_of(model, images):
    return copy.deepcopy(model).eval()(images)


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """Each model in a folder, loaded by timm in one other process."""
    root = tmp_path_factory.mktemp("exported")
    folders = {name: root / re.sub(r"\W", "_", name) for name in MODELS}
    wanted = {}
    for name, folder in folders.items():
        target = target_of(name)
        write_images(folder, images_of(name))
        wanted[name] = logits_of(target, images_of(name))
        export_model(target, folder, classes=CLASSES, data_config=data_config_of(name))
    told = run_elsewhere(IN_TIMM, *folders.values())
    return {name: (wanted[name], folder, told[folder.name]) for name, folder in folders.items()}


@pytest.mark.parametrize("name", MODELS)
def test_timm_alone_computes_the_logits_bit_for_bit(exported, name):
    wanted, folder, _ = exported[name]
    from_folder, from_file = read_logits(folder)
    assert torch.equal(from_folder, wanted)
    assert torch.equal(from_file, wanted)


@pytest.mark.parametrize("name", MODELS)
def test_timm_prepares_images_as_in_training_and_names_the_classes(exported, name):
    _, _, (config, names, attention) = exported[name]
    given = {key: list(v) if isinstance(v, tuple) else v for key, v in data_config_of(name).items()}
    assert config == {**given, "input_size": list(images_of(name).shape[1:])}
    assert names == CLASSES
    assert attention.startswith("timm.")


def test_what_the_pretrained_weights_said_of_themselves_is_left_out(tmp_path):
    model = target_of("images of any size")
    outdated = {"test_input_size": (3, 40, 40), "test_crop_pct": 1.0, "label_names": [*"vwxyz"]}
    model.pretrained_cfg = {**model.pretrained_cfg, **outdated}
    export_model(model, tmp_path / "out", data_config=PREPARED)
    loaded = timm.create_model(f"local-dir:{tmp_path / 'out'}", pretrained=True)
    config = timm.data.resolve_model_data_config(loaded, use_test_size=True)
    assert (config["input_size"], config["crop_pct"]) == ((3, 24, 24), 0.75)
    assert "label_names" not in loaded.pretrained_cfg


def test_the_target_of_stochca_is_exported_and_left_as_it_is(tmp_path):
    model = StochCA(target_of("class token"), p=0.5).train()
    state = copy.deepcopy(model.target.state_dict())
    config, arguments = dict(model.target.pretrained_cfg), dict(model.target._model_args)
    result = export_model(model, tmp_path / "out", data_config=PREPARED)
    assert [file.name for file in result.files] == ["README.md", "config.json", "model.safetensors"]
    assert all(file.is_file() for file in result.files)
    loaded = timm.create_model(f"local-dir:{tmp_path / 'out'}", pretrained=True)
    images = make_images(2, torch.float32)
    assert torch.equal(logits_of(loaded, images), logits_of(model.target, images))
    assert model.training
    assert model.target.training
    assert all(torch.equal(tensor, state[name]) for name, tensor in model.target.state_dict().items())
    assert (model.target.pretrained_cfg, model.target._model_args) == (config, arguments)


def test_channels_last_and_wrapped_models_are_exported(tmp_path):
    model = target_of("class token").to(memory_format=torch.channels_last)
    assert not model.patch_embed.proj.weight.is_contiguous()
    export_model(torch.nn.DataParallel(model), tmp_path / "out")
    loaded = timm.create_model(f"local-dir:{tmp_path / 'out'}", pretrained=True)
    assert all(torch.equal(t, model.state_dict()[name]) for name, t in loaded.state_dict().items())


def test_the_card_says_what_the_model_is_and_how_it_is_loaded(tmp_path):
    export_model(
        target_of("class token"),
        tmp_path / "out",
        classes=CLASSES,
        data_config=PREPARED,
        card={"license": "mit", "details": {"Images of": "a zoo"}},
    )
    text = (tmp_path / "out" / "README.md").read_text()
    for part in (
        "license: mit",
        "# Model card for vit_tiny_patch16_224",
        'timm.create_model("local-dir:out", pretrained=True)',
        "- **Images:** 3 x 24 x 24",
        "- **Mean:** 0.1, 0.2, 0.3",
        "- **Images of:** a zoo",
        "  - elk",
        "arXiv:2402.16092",
    ):
        assert part in text


def test_the_licence_is_that_of_the_weights_or_unknown(tmp_path):
    model = target_of("class token")
    for licence, shown in (("cc-by-nc-4.0", "cc-by-nc-4.0"), (None, "unknown")):
        model.pretrained_cfg = {**model.pretrained_cfg, "license": licence}
        export_model(model, tmp_path / shown)
        assert f"license: {shown}\n" in (tmp_path / shown / "README.md").read_text()


def test_a_folder_that_holds_something_is_refused_and_an_empty_one_is_filled(tmp_path):
    (tmp_path / "out").mkdir()
    model = target_of("class token")
    export_model(model, tmp_path / "out")
    before = {path: path.read_bytes() for path in (tmp_path / "out").iterdir()}
    with pytest.raises(FileExistsError, match=r"out is not empty \(README.md, config.json, model.safet"):
        export_model(model, tmp_path / "out")
    assert {path: path.read_bytes() for path in (tmp_path / "out").iterdir()} == before
    with pytest.raises(FileExistsError, match=r"config.json is a file, wanted a folder"):
        export_model(model, tmp_path / "out" / "config.json")
    assert len({path.stat().st_mode for path in before}) == 1


def test_a_timm_that_cannot_read_the_folder_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr(timm, "__version__", "1.0.9")
    with pytest.raises(ValueError, match=r"exports need timm 1\.0\.26 or newer, got 1\.0\.9"):
        export_model(target_of("class token"), tmp_path / "out")


class Exponential(torch.nn.Module):
    def forward(self, x):
        return x.exp()


def changed(**parts):
    """A model whose parts were replaced after timm had made it."""
    model = target_of("class token")
    for name, part in parts.items():
        setattr(model.blocks[1].mlp, name, part)
    return model


def other_epsilon():
    model = target_of("class token")
    set_norm_eps(model, 1e-12)
    return model


def diverged():
    model = target_of("class token")
    torch.nn.init.constant_(model.head.bias, float("nan"))
    return model


@pytest.mark.parametrize(
    ("make", "arguments", "error", "message"),
    [
        (lambda: torch.nn.Linear(2, 2), {}, TypeError, "wanted a StochCA or a model of timm, got Linear"),
        (lambda: target_of("class token").half(), {}, ValueError, "must be torch.float32, got torch.float16"),
        (None, {"classes": ["ant"]}, ValueError, "classes must be 5 names, one per logit, got 1"),
        (
            None,
            {"formats": ["coreml"]},
            ValueError,
            "formats must be of timm, onnx, torch-export, got coreml",
        ),
        (None, {"data_config": {"size": 3}}, ValueError, "data_config takes input_size, mean, .*, got size"),
        (None, {"data_config": {"input_size": (3, 32, 32)}}, ValueError, r"not take images \[3, 32, 32\]"),
        (
            lambda: target_of("gray images"),
            {},
            ValueError,
            r"mean .* one per channel \(1\), got \(0.5, 0.5, 0",
        ),
        (None, {"model_args": {"dept": 2}}, ValueError, r"give in model_args .*argument 'dept'"),
        (lambda: changed(act=Exponential()), {}, ValueError, "timm rebuilds another model from the export"),
        (lambda: changed(norm=torch.nn.LayerNorm(192)), {}, ValueError, r"Unexpected key.*mlp\.norm"),
        (other_epsilon, {}, ValueError, "cannot say that the epsilon of the layer norms is 1e-12, not 1e-06"),
        (diverged, {}, ValueError, "logits of the model are not all finite"),
    ],
    ids=lambda value: "",
)
def test_what_timm_would_not_load_is_refused_and_leaves_nothing(tmp_path, make, arguments, error, message):
    with pytest.raises(error, match=message):
        export_model(make() if make else target_of("class token"), tmp_path / "out", **arguments)
    assert not [*tmp_path.iterdir()]
