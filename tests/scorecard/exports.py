"""R17: no file holds a key of the source, and what is exported computes the logits of the model."""

import copy
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

from tests.scorecard.row import Case, Figures

# The models of which programs are made: one of each way to pool, to embed positions and to normalise.
MODELS: dict[str, dict[str, Any]] = {
    "class token": {},
    "norms of queries and keys": {"qk_norm": True},
    "attention pooling": {"name": "vit_base_patch16_siglip_224"},
    "two heads": {"name": "deit_tiny_distilled_patch16_224"},
    "gray images": {"in_chans": 1},
    "registers and averages": {"reg_tokens": 2, "global_pool": "avg"},
    "rotary and SwiGLU": {"name": "eva02_tiny_patch14_224"},
    "rotary and registers": {"name": "vit_small_patch16_dinov3"},
}

# Runs whose files are looked into, by what they do beside training.
RUNS: dict[str, list[str]] = {
    "averages": ["--model-ema", "--swad", "--swad-converge", "1", "--swad-tolerance", "1"],
    "adapters": ["--lora-rank", "2"],
    "companions": ["--losses", "[miro]", "--recovery-interval", "1"],
}


def cases(long: bool) -> Iterator[Case]:
    """State dicts, files of runs, and each export of each model."""
    yield Case("state dicts", _state_dicts)
    for name in RUNS if long else ["averages"]:
        yield Case(f"files of a run: {name}", partial(_files, RUNS[name]))
    for name in MODELS if long else ["class token"]:
        yield Case(f"exported: {name}", partial(_exported, MODELS[name], onnx=long))


def _state_dicts() -> Figures:
    """Of the model, its copies and its averages, all of which hold the target alone."""
    import torch
    from timm.utils import ModelEmaV3
    from torch.optim.swa_utils import AveragedModel

    from tests.models import make_model

    model = make_model(dtype=torch.float32)
    optimizer = torch.optim.AdamW(model.parameters())
    states: dict[str, Mapping[str, Any]] = {
        "model": model.state_dict(),
        "copy": copy.deepcopy(model).state_dict(),
        "EMA": ModelEmaV3(model).module.state_dict(),
        "EMA of the target": {
            f"target.{k}": t for k, t in ModelEmaV3(model.target).module.state_dict().items()
        },
        "average": {
            k.removeprefix("module."): t
            for k, t in AveragedModel(model).state_dict().items()
            if k != "n_averaged"
        },
        "parameters": dict(model.named_parameters()),
        "buffers and parameters": {**dict(model.named_buffers()), **dict(model.named_parameters())},
    }
    wanted = {f"target.{name}" for name in model.target.state_dict()}
    count = sum(_source_keys(state, wanted) for state in states.values())
    trained = {id(p) for group in optimizer.param_groups for p in group["params"]}
    count += sum(id(p) in trained for p in model.source.parameters())
    _has_no_values_of(model.source.state_dict(), model.state_dict())
    assert count == 0, f"{count} keys"
    return {"cases": len(states) + 1, "source_keys": count}


def _source_keys(state: Iterable[str], wanted: Iterable[str]) -> int:
    """How many keys there are beside those of the target; each of those has to be there."""
    state, wanted = set(state), set(wanted)
    assert state >= wanted, f"lacks {sorted(wanted - state)[:3]}"
    return len(state - wanted)


def _has_no_values_of(source: Mapping[str, Any], state: Mapping[str, Any]) -> None:
    import torch

    for name, tensor in source.items():
        same = [key for key, t in state.items() if t.shape == tensor.shape and torch.equal(t, tensor)]
        assert not same, f"{same[0]} has the values of the source's {name}"


def _files(more: list[str]) -> Figures:
    """Every file that a run writes, and what timm makes of them."""
    import timm
    import torch
    from safetensors.torch import load_file

    from stochca.checkpoint import load_state
    from tests.scorecard.commands import call, finetuning
    from tests.train.image_folder import write_images
    from tests.weights.others import NAME, SIZES

    plain = timm.create_model(NAME, num_classes=2, **SIZES)
    wanted = set(plain.state_dict())
    with tempfile.TemporaryDirectory() as folder:
        images = write_images(Path(folder) / "images", {"train": 4, "validation": 2}, ("ant", "bee"))
        run = Path(folder) / "run"
        code, errors = call(finetuning(images, run, "--epochs", "4", *more))
        assert code == 0, errors
        files = sorted(run.glob("*.safetensors"))
        assert {file.name for file in files} >= {"last.safetensors", "best.safetensors"}, files
        assert ("--swad" in more) == (run / "swad.safetensors").exists()
        count = sum(_source_keys(load_file(file), wanted) for file in files)
        for file in files:
            timm.create_model(NAME, num_classes=2, checkpoint_path=str(file), **SIZES)
        state = load_state(run / "trainer_state.pt")
        average = state["average"] or state["model"]
        for held in (state["model"], average):
            names = {name.replace(".base_layer", "") for name in held if "lora_" not in name}
            count += _source_keys(names, wanted)
        tensors = [t for t in _tensors(state["optimizer"]) if t.ndim]
        trained = sum("lora_" in name or name.startswith("head") for name in state["model"])
        most = 2 * (trained if "--lora-rank" in more else len(state["model"])) + 2 * len(state["losses"])
        assert len(tensors) <= most, f"{len(tensors)} moments, of at most {most}"
        assert not any(torch.is_tensor(value) for value in state.values()), "a tensor that is of nothing"
    assert count == 0, f"{count} keys"
    return {"cases": len(files) + 2, "source_keys": count}


def _tensors(value: Any) -> Iterator[Any]:
    """All tensors in a nested value."""
    import torch

    if torch.is_tensor(value):
        yield value
    elif isinstance(value, dict):
        for item in value.values():
            yield from _tensors(item)
    elif isinstance(value, list | tuple):
        for item in value:
            yield from _tensors(item)


def _exported(options: dict[str, Any], onnx: bool) -> Figures:
    """Logits in stock timm, ONNX Runtime and torch.export, at a batch size that was not checked yet."""
    import timm
    import torch

    from stochca import StochCA
    from stochca.export.model import export_model
    from tests.models import make_images, make_target

    kwargs = {"name": "vit_tiny_patch16_224", "depth": 2, "dtype": torch.float32, **options}
    model = StochCA(make_target(**kwargs))
    images = make_images(7, torch.float32)[:, : options.get("in_chans", 3)]
    with torch.no_grad():
        wanted = model.eval()(images)
    figures: dict[str, float] = {}

    def compare(name: str, got: torch.Tensor) -> None:
        figures[name] = ((got - wanted).abs().max() / wanted.abs().max()).item()
        assert figures[name] <= 1e-5, f"{name}: {figures[name]:.1e}"

    with tempfile.TemporaryDirectory() as root, torch.no_grad():
        folder = Path(root) / "export"
        formats: Any = ["timm", "torch-export", *(["onnx"] if onnx else [])]
        channels = options.get("in_chans", 3)
        prepared = {"mean": (0.5,) * channels, "std": (0.5,) * channels}
        export_model(model, folder, formats=formats, data_config=prepared)
        compare("timm_difference", timm.create_model(f"local-dir:{folder}", pretrained=True).eval()(images))
        compare("torch_export_difference", torch.export.load(folder / "model.pt2").module()(images))
        if onnx:
            compare("onnx_difference", _in_onnxruntime(folder / "model.onnx", images))
        count = _source_keys(_keys(folder / "model.safetensors"), model.target.state_dict())
        count += sum("source" in name for name in torch.export.load(folder / "model.pt2").state_dict)
    assert count == 0, f"{count} keys"
    return {"cases": len(formats), "source_keys": count, **figures}


def _keys(path: Path) -> list[str]:
    from safetensors import safe_open

    with safe_open(path, "pt") as file:
        return list(file.keys())


def _in_onnxruntime(path: Path, images: Any) -> Any:
    import onnxruntime
    import torch

    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    return torch.from_numpy(session.run(["logits"], {"images": images.numpy()})[0])
