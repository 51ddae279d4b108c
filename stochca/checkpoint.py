"""Files of a run: weights as safetensors, the trainer's state, the options; each is whole at every moment.

`trainer_state.pt` alone is what a run resumes from: it holds the weights as well. The safetensors files and
`metrics.csv` are derived from it, written after it and written again on resuming, so that a crash between two
writes can leave them one checkpoint behind, but never at odds with what a resumed run does.
"""

import contextlib
import csv
import hashlib
import json
import os
import random
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.torch
import torch
import yaml
from torch import nn

from stochca.lora import merged_state
from stochca.weights.intact import DIGEST, check_numbers, digest_of, read_pickled, read_safetensors
from stochca.weights.projection import with_plain_head

STATE = "trainer_state.pt"
LAST = "last.safetensors"
BEST = "best.safetensors"
SWAD = "swad.safetensors"
METRICS = "metrics.csv"
SUMMARY = "summary.json"
CONFIG = "config.yaml"

STATE_FORMAT = 3

# What the trainer puts into its state, beside the format.
STATE_ENTRIES = (
    "options", "world_size", "step", "coin_step", "model", "losses", "swad", "average", "lora_scale",
    "optimizer", "schedule", "scaler", "rng", "running", "history", "source_digest", "classes",
    "train_images",
)  # fmt: skip

# What every file of weights says of its model.
METADATA = ("stochca", "model", "model_kwargs", "num_classes", "classes", "data_config", "step", "metrics")


def write_atomically(path: Path, write: Callable[[Path], None]) -> None:
    """Have `write` fill a temporary file beside `path`, and put it in place once it is on disk.

    Args:
        path: Holds either its old content or the whole new one, whenever the process or the machine stops.
        write: Gets the path to write to.

    Raises:
        OSError: The disk is full, or the folder cannot be written; names `path`.
    """
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        try:
            write(temporary)
            with open(temporary, "rb+") as file:
                os.fsync(file.fileno())
            os.replace(temporary, path)
        finally:
            # Of the path itself, an error tells more than that there is nothing to remove.
            with contextlib.suppress(OSError):
                temporary.unlink()
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)
    except (OSError, RuntimeError) as error:
        cause = _system_error(error)
        if cause is None or cause.errno is None:
            raise
        raise OSError(cause.errno, cause.strerror, str(path)) from error


def _system_error(error: BaseException | None) -> OSError | None:
    """What the system said: torch raises an error of its own over it."""
    while error is not None and not isinstance(error, OSError):
        error = error.__context__
    return error


def open_output(output: Path, *, resume: bool) -> dict[str, Any] | None:
    """Make the folder of a new run, or read the state of the one to resume.

    Args:
        output: The folder.
        resume: Continue the run in it.

    Returns:
        The trainer's state, None for a new run.

    Raises:
        FileExistsError: A new run where there is one already.
        FileNotFoundError: Nothing to resume.
        ValueError: The state is truncated, or of another version.
    """
    if resume:
        return load_state(output / STATE)
    held = [name for name in (STATE, LAST, BEST, METRICS) if (output / name).exists()]
    if held:
        raise FileExistsError(
            f"{output} already holds a run ({', '.join(held)}): continue it with --resume {output}, "
            "or choose another --output"
        )
    if output.exists() and not output.is_dir():
        raise FileExistsError(f"--output {output} is a file, wanted a folder")
    output.mkdir(parents=True, exist_ok=True)
    return None


def save_weights(path: Path, state_dict: dict[str, torch.Tensor], metadata: dict[str, Any]) -> None:
    """Write a timm state dict that `timm.create_model(..., checkpoint_path=path)` loads.

    Args:
        path: The safetensors file.
        state_dict: Of the plain timm model.
        metadata: Strings stay as they are, everything else is written as JSON. The digest that
            `read_safetensors` checks is put beside it.
    """
    tensors = {name: tensor.contiguous() for name, tensor in state_dict.items()}
    text = {name: v if isinstance(v, str) else json.dumps(v) for name, v in metadata.items()}
    text = {"format": "pt", **text}
    text[DIGEST] = digest_of(tensors, text)

    def write(file: Path) -> None:
        # safetensors' own `save_file` fills a file of a random name, which a killed process would leave.
        file.write_bytes(safetensors.torch.save(tensors, text))

    write_atomically(path, write)


def read_metadata(path: Path) -> dict[str, Any]:
    """The metadata of a checkpoint of ours; raises what `read_checkpoint` does."""
    return read_checkpoint(path)[1]


def read_checkpoint(path: Path) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """The weights and the metadata of a checkpoint of ours.

    Raises:
        FileNotFoundError: No such file.
        ValueError: Damaged, not complete, not written by `stochca finetune` or `stochca convert`, or with
            values that are not finite.
    """
    if not path.is_file():
        raise FileNotFoundError(f"there is no checkpoint {path}")
    state_dict, text = read_safetensors(path)
    if missing := [name for name in METADATA if name not in text]:
        raise ValueError(
            f"{path} was not written by stochca finetune: its metadata lack {', '.join(missing)}, they have "
            f"{', '.join(sorted(text)) or 'nothing'}"
        )
    strings = {"model", "stochca", "format", "converted_from"}
    try:
        metadata = {name: value if name in strings else json.loads(value) for name, value in text.items()}
    except ValueError as error:
        raise ValueError(f"{path} has metadata that are no JSON: {error}") from error
    for name, kind in (("model_kwargs", dict), ("data_config", dict), ("num_classes", int)):
        if not isinstance(metadata[name], kind):
            raise ValueError(
                f"{path} has metadata whose {name} must be {kind.__name__}, got {metadata[name]!r}"
            )
    check_numbers(state_dict, str(path))
    return state_dict, metadata


def load_weights(path: Path, model: nn.Module, name: str) -> None:
    """Load a checkpoint into a timm model, strictly.

    Args:
        path: The safetensors file.
        model: Gets the weights.
        name: What the model is called in errors.

    Raises:
        FileNotFoundError: No such file.
        ValueError: As of `read_checkpoint`, or weights of another model.
    """
    state_dict, _ = read_checkpoint(path)
    load_state_dict(model, state_dict, f"{path} does not fit {name}")


def load_state_dict(model: nn.Module, state_dict: dict[str, torch.Tensor], complaint: str) -> None:
    """`model.load_state_dict`, with an error that names what was wanted and what came."""
    check_state_dict(model, state_dict, complaint)
    model.load_state_dict(state_dict)


def check_state_dict(model: nn.Module, state_dict: dict[str, torch.Tensor], complaint: str) -> None:
    """Raise a ValueError that names what was wanted and what came where names, shapes or kinds differ."""
    wanted, came = _described(model.state_dict()), _described(state_dict)
    if wanted != came:
        keys = [key for key in sorted({**wanted, **came}) if wanted.get(key) != came.get(key)]
        shown = ", ".join(f"{key} wanted {wanted.get(key)}, got {came.get(key)}" for key in keys[:3])
        raise ValueError(f"{complaint}: {len(keys)} tensors differ: {shown}{', ...' * (len(keys) > 3)}")


def _described(state_dict: Mapping[str, Any]) -> dict[str, Any]:
    """The shape of each tensor, and its dtype where it holds no real numbers."""
    return {
        key: (*value.shape, *(() if value.is_floating_point() else (value.dtype,)))
        if isinstance(value, torch.Tensor)
        else type(value).__name__
        for key, value in state_dict.items()
    }


def save_state(path: Path, state: dict[str, Any]) -> None:
    """Write the trainer's state."""
    save_pickled(path, {"format": STATE_FORMAT, **state})


def save_pickled(path: Path, value: Any) -> None:
    """Write what `torch.load` reads."""

    def write(file: Path) -> None:
        with open(file, "wb") as stream:  # with a path, torch would not tell what the system said
            torch.save(value, stream)

    write_atomically(path, write)


def save_derived(
    output: Path, state: dict[str, Any], best_step: int | None, metadata: dict[str, Any]
) -> None:
    """Write what follows from the state: the weights, the best ones if these are, and the metrics.

    Args:
        output: Folder of the run.
        state: With the entries `step`, `model`, `average` (None without one), `lora_scale` and `history`.
        best_step: The step of the best evaluation, None before the first.
        metadata: Of the weights.
    """
    weights = with_plain_head(merged_state(state["average"] or state["model"], state["lora_scale"]))
    save_weights(output / LAST, weights, metadata)
    if best_step == state["step"]:
        save_weights(output / BEST, weights, metadata)
    if state["history"]:
        save_metrics(output / METRICS, state["history"])


def load_state(path: Path) -> dict[str, Any]:
    """Read the trainer's state, on the CPU and without running any code in it."""
    if not path.is_file():
        raise FileNotFoundError(f"nothing to resume: there is no {path}")
    try:
        state = read_pickled(path)
    except ValueError as error:
        reason = str(error).removeprefix(f"{path} ")
        raise ValueError(f"{path} is not a complete trainer state, it {reason}") from error
    found = state.get("format") if isinstance(state, dict) else None
    if found != STATE_FORMAT:
        raise ValueError(f"{path} must be a trainer state of format {STATE_FORMAT}, got {found}")
    if differing := sorted({*STATE_ENTRIES, "format"} ^ state.keys(), key=str):
        raise ValueError(f"{path} is no trainer state: {', '.join(map(str, differing))} missing or not known")
    for name in ("options", "model", "optimizer"):
        if not isinstance(state[name], dict):
            raise ValueError(f"{path} is no trainer state: {name} must be a dict, got {state[name]!r:.50}")
    for name in ("model", "average"):
        check_numbers(state[name] or {}, f"{path}, {name}")
    return state


def check_optimizer(optimizer: torch.optim.Optimizer) -> None:
    """Raise a ValueError where a moment has not the shape of its parameter, which torch does not look at."""
    for parameter, moments in optimizer.state.items():
        for name in ("exp_avg", "exp_avg_sq", "momentum_buffer"):
            moment = moments.get(name)
            # Some optimizers have one number for all of a parameter.
            if isinstance(moment, torch.Tensor) and moment.ndim and moment.shape != parameter.shape:
                shapes = tuple(parameter.shape), tuple(moment.shape)
                raise ValueError(f"{name} of a parameter must have its shape {shapes[0]}, got {shapes[1]}")


def save_config(path: Path, options: dict[str, Any]) -> None:
    """Write the resolved options as YAML."""
    text = yaml.safe_dump(options, sort_keys=False)

    def write(file: Path) -> None:
        file.write_text(text)

    write_atomically(path, write)


def read_config(path: Path) -> dict[str, Any]:
    """The options in a YAML file, of which no code runs.

    Raises:
        ValueError: It is no YAML, or holds something else.
    """
    try:
        options = yaml.safe_load(path.read_text())
    except yaml.YAMLError as error:
        raise ValueError(f"{path} is no YAML: {' '.join(str(error).split())}") from error
    if not isinstance(options, dict):
        raise ValueError(f"{path} must hold options by name, got {options!r:.50}")
    return options


def save_metrics(path: Path, rows: list[dict[str, Any]]) -> None:
    """Write all evaluations so far as CSV."""

    def write(file: Path) -> None:
        with open(file, "w", newline="") as stream:
            writer = csv.DictWriter(stream, list(rows[0]))
            writer.writeheader()
            writer.writerows(rows)

    write_atomically(path, write)


def save_summary(path: Path, summary: dict[str, Any]) -> None:
    """Write what a run came to, as JSON; its presence says that the run is complete."""
    text = json.dumps(summary, indent=2) + "\n"

    def write(file: Path) -> None:
        file.write_text(text)

    write_atomically(path, write)


def digest(module: nn.Module) -> str:
    """SHA-256 of a module's state dict."""
    sha = hashlib.sha256()
    for name, tensor in module.state_dict().items():
        sha.update(name.encode())
        sha.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    return sha.hexdigest()


def rng_state() -> dict[str, Any]:
    """State of every global random number generator, in types that load without pickled code."""
    name, keys, *rest = np.random.get_state(legacy=True)
    return {
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
        "numpy": [name, torch.from_numpy(np.asarray(keys).astype(np.int64)), *rest],
        "python": random.getstate(),
    }


def set_rng_state(state: dict[str, Any]) -> None:
    """Restore what `rng_state` returned; CUDA's where the number of devices is the same."""
    torch.set_rng_state(state["torch"])
    if state["cuda"] and len(state["cuda"]) == torch.cuda.device_count():
        torch.cuda.set_rng_state_all(state["cuda"])
    name, keys, *rest = state["numpy"]
    np.random.set_state((name, keys.numpy().astype(np.uint32), *rest))
    random.setstate(state["python"])
