"""Export or publish a trained model, checked against the one at hand."""

import contextlib
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple

from huggingface_hub import get_token
from huggingface_hub.errors import HfHubHTTPError
from huggingface_hub.utils import validate_repo_id
from timm.models import push_to_hf_hub
from torch import nn

from stochca.export.card import model_card
from stochca.export.options import TOLERANCE, Format
from stochca.export.plain import PlainModel, brief, check_folder, plain_model, save_folder
from stochca.export.programs import WRITERS, check_packages, largest_error, trace

# An answer of the hub is both of its bases; a connection that fails is that of the HTTP library alone.
_HUB_ERRORS: Any = (OSError, *HfHubHTTPError.__bases__)


class Export(NamedTuple):
    """What was written.

    Args:
        output: The folder.
        files: What is in it.
        errors: Of each program, by its format: largest difference to the model's logits, relative to the
            largest of them.
    """

    output: Path
    files: list[Path]
    errors: dict[str, float]


def export_model(
    model: nn.Module,
    output: str | Path,
    *,
    formats: Sequence[Format] = ("timm",),
    classes: Sequence[str] | None = None,
    data_config: Mapping[str, Any] | None = None,
    model_args: Mapping[str, Any] | None = None,
    card: Mapping[str, Any] | None = None,
    tolerance: float = TOLERANCE,
) -> Export:
    """Write a trained model so that it runs without this package.

    What is written is read back and compared with the model: in timm logits are the same bit for bit,
    programs are compared at several batch sizes. The folder appears when all of it is written and checked,
    and not at all otherwise.

    Args:
        model: A `StochCA`, whose target is exported, or a timm model, of StochCAAttention or not; also within
            DDP, a moving average or a compiled module. It is left as it is.
        output: A folder that does not exist, or is empty.
        formats: "timm": `model.safetensors`, `config.json` and the model card `README.md`, which
            `timm.create_model("local-dir:<output>", pretrained=True)` loads and the Hugging Face hub knows.
            "onnx": `model.onnx`, of opset 18. "torch-export": `model.pt2`. Programs take normalised images
            `[batch, channels, height, width]`, return logits, and hold classes and normalisation as metadata.
        classes: Their names, in the order of the logits.
        data_config: How images are prepared, as `timm.data.resolve_data_config` returns it; what it lacks is
            taken from the model's `pretrained_cfg`.
        model_args: Arguments the model was created with, where timm has not recorded them (before 1.0.31) or
            they cannot be written as JSON: `{"norm_layer": "layernorm"}` instead of a class.
        card: Entries for the model card, as timm's `push_to_hf_hub` takes them.
        tolerance: Largest error of a program, relative to the largest logit.

    Returns:
        What was written.

    Raises:
        FileExistsError: The folder holds something.
        TypeError: No model of timm.
        ValueError: timm does not rebuild the model, a program differs from it, a package is missing or too
            old, or an argument does not fit.
    """
    if unknown := sorted({*formats} - {"timm", *WRITERS}):
        raise ValueError(f"formats must be of timm, {', '.join(WRITERS)}, got {', '.join(unknown)}")
    check_packages(formats)
    plain = plain_model(model, classes, data_config, model_args)
    with _new_folder(Path(output)) as folder:
        if "timm" in formats:
            _save_checked(plain, folder, f"local-dir:{folder.name}", card)
        errors = _write_programs(plain, folder, [name for name in WRITERS if name in formats], tolerance)
        names = sorted(file.name for file in folder.iterdir())
    return Export(Path(output), [Path(output, name) for name in names], errors)


def push_model(
    model: nn.Module,
    repository: str,
    *,
    private: bool = False,
    classes: Sequence[str] | None = None,
    data_config: Mapping[str, Any] | None = None,
    model_args: Mapping[str, Any] | None = None,
    card: Mapping[str, Any] | None = None,
) -> str:
    """Publish a trained model on the Hugging Face hub, by timm's `push_to_hf_hub`.

    `timm.create_model("hf-hub:<repository>", pretrained=True)` loads it from there; that it can is checked
    first, on this machine. A card that the repository has already is kept.

    Args:
        model: As in `export_model`.
        repository: "owner/name"; made if it does not exist.
        private: Make it private if it is made.
        classes: As in `export_model`.
        data_config: As in `export_model`.
        model_args: As in `export_model`.
        card: As in `export_model`.

    Returns:
        Address of the commit.

    Raises:
        TypeError: As `export_model`.
        ValueError: As `export_model`, or `repository` is no name.
        OSError: No token, no network, or the hub refuses.
    """
    check_hub(repository)
    plain, address = plain_model(model, classes, data_config, model_args), f"hf-hub:{repository}"
    with TemporaryDirectory() as folder:
        _save_checked(plain, Path(folder), address, card)
    try:
        return push_to_hf_hub(
            plain.model,
            repository,
            private=private,
            model_card=model_card(plain, address, card),
            **plain.config(),
        )
    except _HUB_ERRORS as error:
        raise OSError(f"cannot publish {repository} on the Hugging Face hub: {brief(error)}") from error


def check_hub(repository: str) -> None:
    """Refuse what `push_model` could not publish, before anything is computed.

    Raises:
        ValueError: Not of the form "owner/name".
        OSError: No token.
    """
    if repository.count("/") != 1:
        raise ValueError(f"a repository on the Hugging Face hub must be named OWNER/NAME, got {repository!r}")
    validate_repo_id(repository)
    if get_token() is None:
        raise OSError("the Hugging Face hub needs a token: run `hf auth login`, or set HF_TOKEN")


def _save_checked(plain: PlainModel, folder: Path, address: str, card: Mapping[str, Any] | None) -> None:
    """Write timm's folder, and see that timm loads the model from it."""
    save_folder(plain, folder, model_card(plain, address, card))
    check_folder(plain, folder)


def _write_programs(
    plain: PlainModel, folder: Path, formats: Sequence[str], tolerance: float
) -> dict[str, float]:
    """Write programs, read them back, and return their errors, all of which are within the tolerance."""
    errors: dict[str, float] = {}
    program = trace(plain) if formats else None
    for name in formats:
        assert program is not None
        written = WRITERS[name](program, plain, folder)
        errors[name] = error = largest_error(written.run, plain)
        if not error <= tolerance:
            raise ValueError(
                f"{name}: logits must be within {tolerance:g} of the model's largest one, got {error:.1e}"
            )
    return errors


@contextlib.contextmanager
def _new_folder(output: Path) -> Iterator[Path]:
    """A folder to fill, which becomes `output` once it is on disk, and vanishes after an error."""
    if output.exists() and not output.is_dir():
        raise FileExistsError(f"{output} is a file, wanted a folder")
    if output.is_dir() and (held := sorted(path.name for path in output.iterdir())):
        raise FileExistsError(
            f"{output} is not empty ({', '.join(held[:3])}{', ...' * (len(held) > 3)}): choose another folder"
        )
    output = output.absolute()
    output.parent.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(prefix=f".{output.name}.", dir=output.parent) as temporary:
        folder = Path(temporary, output.name)
        folder.mkdir()
        yield folder
        for file in folder.iterdir():
            with open(file, "rb+") as stream:
                os.fsync(stream.fileno())
        os.replace(folder, output)
