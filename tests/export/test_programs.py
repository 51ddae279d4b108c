"""ONNX and torch.export."""

import json

import onnx
import pytest
import torch

from stochca.export import programs
from stochca.export.model import export_model
from stochca.export.plain import plain_model
from tests.export.processes import PROGRAMS, read_logits, run_elsewhere, write_images
from tests.models import make_images, make_target

PREPARED = {"mean": (0.1, 0.2, 0.3), "std": (0.5, 0.6, 0.7), "crop_pct": 0.75}


def small(name="vit_tiny_patch16_224", **kwargs):
    return make_target(name, torch.float32, **{"depth": 1, **kwargs}).eval()


@torch.no_grad()
def logits_of(model, images):
    return model(images)


MODELS = {
    "norms of queries and keys": {"qk_norm": True},
    "rotary": {"name": "eva02_tiny_patch14_224"},
}


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """Each model as programs, run in one other process on more images than they were checked with."""
    root, found, images = tmp_path_factory.mktemp("programs"), {}, make_images(7, torch.float32)
    for name, options in MODELS.items():
        target, folder = small(**options), root / name.replace(" ", "_")
        with pytest.MonkeyPatch.context() as patch:
            if name == "norms of queries and keys":
                patch.setattr(programs, "LARGEST_FILE", 1000)
            result = export_model(
                target, folder, formats=["onnx", "torch-export"], classes=[*"abcde"], data_config=PREPARED
            )
        write_images(folder, images)
        found[name] = (logits_of(target, images), folder, result)
    told = run_elsewhere(PROGRAMS, *(folder for _, folder, _ in found.values()))
    return {name: (*found[name], *told[found[name][1].name]) for name in MODELS}


@pytest.mark.parametrize("name", MODELS)
def test_programs_run_without_timm_at_another_batch_size(exported, name):
    wanted, folder, result, *_ = exported[name]
    assert 0 < result.errors["onnx"] <= 1e-5
    assert result.errors["torch-export"] <= 1e-5
    for got in read_logits(folder):
        assert ((got - wanted).abs().max() / wanted.abs().max()).item() <= 1e-5


@pytest.mark.parametrize("name", MODELS)
def test_programs_hold_classes_and_preparation(exported, name):
    *_, in_onnx, in_torch = exported[name]
    assert in_onnx == in_torch
    assert in_onnx["architecture"] == MODELS[name].get("name", "vit_tiny_patch16_224")
    assert json.loads(in_onnx["classes"]) == [*"abcde"]
    assert json.loads(in_onnx["mean"]) == [0.1, 0.2, 0.3]
    assert json.loads(in_onnx["crop_pct"]) == 0.75
    assert json.loads(in_onnx["input_size"]) == [3, 24, 24]


def test_weights_lie_beside_the_graph_where_one_file_cannot_hold_them(exported):
    names = {name: [file.name for file in result.files] for name, (_, _, result, *_) in exported.items()}
    assert names["rotary"] == ["model.onnx", "model.pt2"]
    assert names["norms of queries and keys"] == ["model.onnx", "model.onnx.data", "model.pt2"]
    graph = onnx.load(exported["norms of queries and keys"][2].files[0], load_external_data=False)
    assert graph.opset_import[0].version == 18


@pytest.fixture
def replace_onnx(monkeypatch):
    """Have the program for ONNX be a function of the images."""

    def replace(run):
        def write(program, plain, folder):
            (folder / "model.onnx").touch()
            return programs.Written([], run)

        monkeypatch.setitem(programs.WRITERS, "onnx", write)
        monkeypatch.setattr("stochca.export.model.trace", lambda plain: object())

    return replace


def test_a_program_that_differs_at_one_batch_size_is_refused_and_nothing_is_left(tmp_path, replace_onnx):
    model = small()
    replace_onnx(lambda images: model(images) * (1 if len(images) < 5 else 1 + 2e-5))
    with pytest.raises(
        ValueError, match=r"^onnx: logits must be within 1e-05 of the model.s largest one, got 2\.0e-05$"
    ):
        export_model(model, tmp_path / "out", formats=["timm", "onnx"])
    assert not [*tmp_path.iterdir()]
    assert export_model(model, tmp_path / "out", formats=["onnx"], tolerance=3e-5).errors["onnx"] > 1e-5


def test_an_error_that_is_no_number_is_refused(tmp_path, replace_onnx):
    replace_onnx(lambda images: torch.full((len(images), 5), torch.nan))
    with pytest.raises(ValueError, match="got nan"):
        export_model(small(), tmp_path / "out", formats=["onnx"])


def test_packages_that_are_missing_are_named_before_anything_is_written(tmp_path, monkeypatch):
    monkeypatch.setattr(programs, "_ONNX_PACKAGES", ("onnx", "onnxruntime_of_nobody"))
    with pytest.raises(ValueError, match=r"needs onnxruntime_of_nobody: pip install stochca\[onnx\]"):
        export_model(small(), tmp_path / "out", formats=["onnx"])
    assert not [*tmp_path.iterdir()]


def test_what_torch_cannot_trace_is_one_error(tmp_path):
    model = small()
    model.head = Branching(model.head)
    with pytest.raises(ValueError, match=r"^torch\.export does not follow the model: [^\n]*$"):
        export_model(model, tmp_path / "out", formats=["torch-export"])


def test_what_onnx_has_no_operator_for_is_one_error(tmp_path):
    plain = plain_model(small())
    program = programs.trace(plain._replace(model=Bessel()))
    with pytest.raises(ValueError, match=r"torch\.onnx does not translate the model: No ONNX .*bessel_j0"):
        programs.write_onnx(program, plain, tmp_path)


class Bessel(torch.nn.Module):
    def forward(self, x):
        return torch.special.bessel_j0(x)


class Branching(torch.nn.Module):
    """A head that looks at its data."""

    def __init__(self, head):
        super().__init__()
        self.head = head

    def forward(self, x):
        return self.head(x) if x.sum() > 0 else -self.head(x)
