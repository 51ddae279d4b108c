"""The target as a program that runs without its Python code: ONNX and `torch.export`."""

import contextlib
import importlib.util
import json
import logging
import warnings
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor
from torch.export import Dim, ExportedProgram

from stochca.export.plain import PlainModel, brief, logits_of

# What torch translates to; it would convert from there to others.
OPSET = 18

INPUT, OUTPUT = "images", "logits"

# Sizes other than that of the trace, and 1, which a program might have taken for a constant.
BATCH_SIZES = (1, 2, 5)

# A protobuf message ends at 2 GiB, some of which the graph needs.
LARGEST_FILE = 2**31 - 2**26

_ONNX_PACKAGES = ("onnx", "onnxruntime", "onnxscript")


class Written(NamedTuple):
    """A program on disk.

    Args:
        files: What it consists of, the one to load first.
        run: What it computes, read back from there: images to logits.
    """

    files: list[Path]
    run: Callable[[Tensor], Tensor]


def check_packages(formats: Iterable[str]) -> None:
    """Raise a ValueError that names the packages which a format needs and which are not installed."""
    missing = [name for name in _ONNX_PACKAGES if importlib.util.find_spec(name) is None]
    if "onnx" in formats and missing:
        raise ValueError(f"the format onnx needs {', '.join(missing)}: pip install stochca[onnx]")


def trace(plain: PlainModel) -> ExportedProgram:
    """The model as a graph that takes any number of images.

    Raises:
        ValueError: The model does something that `torch.export` does not follow.
    """
    try:
        return torch.export.export(
            plain.model, (plain.random_images(2),), dynamic_shapes=({0: Dim("batch")},)
        )
    except RuntimeError as error:
        raise ValueError(f"torch.export does not follow the model: {_reason(error)}") from error


def write_torch_export(program: ExportedProgram, plain: PlainModel, folder: Path) -> Written:
    """Write `model.pt2`, which holds the metadata as JSON in the extra file `metadata.json`."""
    path = folder / "model.pt2"
    torch.export.save(program, path, extra_files={"metadata.json": json.dumps(plain.metadata())})
    with _quiet():
        return Written([path], torch.export.load(path).module())


def write_onnx(program: ExportedProgram, plain: PlainModel, folder: Path) -> Written:
    """Write `model.onnx` with the metadata in it; beyond 2 GiB with its weights in `model.onnx.data`.

    Raises:
        ValueError: An operator has no translation.
    """
    import onnxruntime

    path = folder / "model.onnx"
    is_large = sum(t.numel() * t.element_size() for t in program.state_dict.values()) > LARGEST_FILE
    try:
        with _quiet():
            translated = torch.onnx.export(
                program,
                dynamo=True,
                opset_version=OPSET,
                input_names=[INPUT],
                output_names=[OUTPUT],
                dynamic_shapes=({0: "batch"},),
                verbose=False,
            )
    except RuntimeError as error:
        raise ValueError(f"torch.onnx does not translate the model: {_reason(error)}") from error
    assert translated is not None
    translated.model.metadata_props.update(plain.metadata())
    translated.save(path, external_data=is_large)
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])

    def run(images: Tensor) -> Tensor:
        return torch.from_numpy(session.run([OUTPUT], {INPUT: images.numpy()})[0])

    return Written([path, path.with_name("model.onnx.data")] if is_large else [path], run)


WRITERS = {"onnx": write_onnx, "torch-export": write_torch_export}


def largest_error(run: Callable[[Tensor], Tensor], plain: PlainModel) -> float:
    """Largest difference of the logits over several batch sizes, relative to the largest logit."""
    errors = []
    for number in BATCH_SIZES:
        images = plain.random_images(number)
        wanted = logits_of(plain.model, images)
        scale = wanted.abs().max().clamp(min=torch.finfo(wanted.dtype).tiny)
        errors.append((run(images) - wanted).abs().max() / scale)
    return torch.stack(errors).max().item()  # NaN if one is


def _reason(error: BaseException) -> str:
    """What has caused an error, without the advice that torch adds."""
    while error.__cause__ is not None:
        error = error.__cause__
    return brief(error)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without what torch and onnxscript say to their own developers."""
    logger = logging.getLogger("onnxscript.optimizer._constant_folding")
    level = logger.level
    logger.setLevel(logging.ERROR)  # each Split that it does not fold
    try:
        with warnings.catch_warnings():
            # torch.onnx copies its own trees of arguments, torch.export.load reads its own bytes.
            warnings.filterwarnings("ignore", ".*LeafSpec.*deprecated", FutureWarning)
            warnings.filterwarnings("ignore", "The given buffer is not writable", UserWarning)
            yield
    finally:
        logger.setLevel(level)
