"""A small run and its weights in each form, and what reads them: the whole files of R11."""

import atexit
import json
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.torch
import timm
import torch
from torch import Tensor

from stochca.checkpoint import digest, load_state, read_metadata, save_weights
from stochca.config import FinetuneOptions
from stochca.evaluation import rebuild
from stochca.export.model import export_model
from stochca.train import Trainer, finetune
from stochca.weights.creation import create_vit
from stochca.weights.reading import read_weights
from tests.models import perturb
from tests.scorecard.damaged_checkpoints import Way
from tests.train.image_folder import write_images
from tests.weights.others import NAME, SIZES, as_jax

_KWARGS = {name: value for name, value in SIZES.items() if name != "img_size"}


class Runs:
    """Code in a pickle: makes a file."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> Any:
        return eval, (f"open({str(self.marker)!r}, 'w').close()",)


@cache
def options() -> FinetuneOptions:
    """Of a run of one epoch, from weights in a file."""
    root = Path(tempfile.mkdtemp())
    atexit.register(shutil.rmtree, root)
    images = write_images(root / "images", {"train": 2, "validation": 2}, ("ant", "bee"))
    model = timm.create_model(NAME, num_classes=2, **SIZES)
    perturb(model)
    path = root / "foreign.safetensors"
    safetensors.torch.save_file(model.state_dict(), path)
    return FinetuneOptions(
        model=NAME,
        pretrained_path=str(path),
        img_size=SIZES["img_size"],
        model_kwargs=_KWARGS,
        data_dir=str(images),
        batch_size=4,
        epochs=1,
        warmup_epochs=0,
        workers=0,
        device="cpu",
        output=str(root / "run"),
    )


@cache
def made() -> dict[str, Way]:
    """The run, and its weights as others have them."""
    finetune(options())
    run, foreign = Path(options().output), Path(options().pretrained_path or "")
    root = run.parent
    torch.save(safetensors.torch.load_file(foreign), root / "weights.pth")
    model = create_vit(NAME, read_weights(foreign), **SIZES)
    export_model(model, root / "folder", model_args=SIZES)
    np.savez(root / "jax.npz", **as_jax(model.state_dict()))
    return {
        "evaluate": Way(run / "last.safetensors", _evaluate),
        "pretrained": Way(run / "best.safetensors", _pretrained),
        "resume": Way(run / "trainer_state.pt", _state),
        "foreign": Way(foreign, _pretrained),
        "pickle": Way(root / "weights.pth", _pretrained),
        "jax": Way(root / "jax.npz", _pretrained),
        "folder": Way(root / "folder" / "model.safetensors", _folder),
        "finetune": Way(foreign, _finetune),
    }


def write(path: Path, state: Mapping[str, Tensor], like: Path | None) -> None:
    """Write weights as we do with the metadata of a file of ours, or as others do."""
    if like is not None:
        save_weights(path, dict(state), read_metadata(like))
    elif path.suffix == ".pth":
        torch.save(dict(state), path)
    else:
        safetensors.torch.save_file(dict(state), path)


def resume(path: Path) -> str:
    """Continue the run in the folder of a state."""
    return digest(Trainer(FinetuneOptions(**{**vars(options()), "resume": str(path.parent)})).model.target)


def commands(folder: Path) -> Iterator[tuple[list[str], Path]]:
    """Commands, and the damaged file that each has to name."""
    run = Path(shutil.copytree(options().output, folder / "run")) if made() else folder
    weights, foreign = run / "last.safetensors", folder / "foreign.pth"
    for file in (weights, run / "best.safetensors", run / "trainer_state.pt"):
        file.write_bytes(file.read_bytes()[:-100])
    foreign.write_bytes(made()["pickle"].path.read_bytes()[:-100])
    data = ["--data-dir", str(options().data_dir)]
    model = ["--model", NAME, "--img-size", str(SIZES["img_size"]), "--model-kwargs", json.dumps(_KWARGS)]
    output = ["--output", str(folder / "new")]
    yield ["evaluate", str(weights), *data], weights
    yield ["finetune", *model, *data, *output, "--pretrained-path", str(foreign)], foreign
    yield ["finetune", "--resume", str(run)], run / "trainer_state.pt"
    yield ["finetune", *model, *data, *output, "--source-path", str(foreign), "--no-pretrained"], foreign
    yield ["export", str(run), *output], run / "best.safetensors"
    yield ["convert", str(foreign), *model, "--output", str(folder / "new.safetensors")], foreign
    yield ["analyze", str(run), *data, *output], run / "best.safetensors"


def _evaluate(path: Path) -> Any:
    """What `stochca evaluate`, `export` and `analyze` begin with."""
    model, metadata = rebuild(path)
    return digest(model), metadata


def _pretrained(path: Path) -> Any:
    """What `--pretrained-path`, `--source-path` and `stochca convert` begin with."""
    weights = read_weights(path)
    return digest(create_vit(NAME, weights, **_sizes(path))), weights.facts


def _folder(path: Path) -> Any:
    """`--model local-dir:...`, for other classes, where timm itself overlooks what is missing."""
    if path.parent != made()["folder"].path.parent:
        shutil.copy(made()["folder"].path.with_name("config.json"), path.parent)
    torch.manual_seed(0)
    return digest(create_vit(f"local-dir:{path.parent}", num_classes=7))


def _finetune(path: Path) -> Any:
    changed = {"pretrained_path": str(path), "output": str(path.with_name("run"))}
    trainer = Trainer(FinetuneOptions(**{**vars(options()), **changed}))
    return trainer.source_digest, digest(trainer.model.target)


def _state(path: Path) -> str:
    return _told(load_state(path))


def _told(value: Any) -> str:
    """A nested value in words, with all bits of its tensors."""
    if isinstance(value, Tensor):
        data = value.contiguous().flatten().view(torch.uint8).numpy().tobytes()
        return f"{value.dtype} {list(value.shape)} {data!r}"
    if isinstance(value, dict):
        return "{" + ", ".join(f"{key!r}: {_told(item)}" for key, item in value.items()) + "}"
    if isinstance(value, list | tuple):
        return f"{type(value).__name__}({', '.join(map(_told, value))})"
    return repr(value)


def _sizes(path: Path) -> dict[str, Any]:
    return {**SIZES, "num_classes": 2} if path.suffix == ".npz" else SIZES
