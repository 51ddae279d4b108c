"""Files of weights in any layout that is known, read without running code that is in them."""

import argparse
import pickle
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from timm.models import load_state_dict
from torch import Tensor

from stochca.weights.facts import Facts, facts_of
from stochca.weights.layouts import State, layout_of, shortened

JAX = "JAX"


@dataclass(frozen=True)
class Weights:
    """What a file holds.

    Args:
        path: Of the file.
        layout: Name of its layout.
        state: Tensors under names that timm's own loading takes.
        left_out: Names of those for which a timm model has no use.
        facts: What it says of the model.
    """

    path: Path
    layout: str
    state: State
    left_out: list[str]
    facts: Facts

    @property
    def num_classes(self) -> int:
        """Of its classifier, which is CLIP's projection in some; 0 without one."""
        if isinstance(projection := self.state.get("visual.proj"), Tensor):
            return projection.shape[1]
        head = self.state.get("head.weight", self.state.get("visual.head.proj.weight"))
        return len(head) if isinstance(head, Tensor) else 0

    def describe(self) -> str:
        """What was found, what was left out and what could not be told, in one line."""
        left_out = f"; left out: {shortened(self.left_out)}" if self.left_out else ""
        unknown = ""
        if self.layout == "OpenAI CLIP" and self.facts.activation is None:
            unknown = "; it does not say whether its activation functions are GELU or QuickGELU"
        return f"{self.path}: weights in the layout of {self.layout}{left_out}{unknown}"


def read_weights(path: str | Path) -> Weights:
    """Read a safetensors file, or one of `torch.save` that holds tensors and plain values alone.

    As in timm, a moving average in it is preferred, and `state_dict` or `model` is looked into. An .npz file
    is left to timm's loader of JAX weights.

    Args:
        path: Its layout is found by the names in it. The JSON files that Hugging Face and open_clip publish
            beside it are read too.

    Raises:
        FileNotFoundError: No such file.
        ValueError: It is not complete, needs code to be run, or is of no layout that is known.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path} is not a file")
    if path.suffix == ".npz":
        return Weights(path, JAX, {}, [], Facts())
    state, metadata = _read(path)
    if not any(isinstance(value, Tensor | dict) for value in state.values()):
        raise ValueError(f"{path} holds no tensors, but {shortened(list(state)) or 'nothing'}")
    layout = layout_of(state)
    facts = facts_of(layout.name, state, path, metadata)
    try:
        state, left_out = layout.convert(state)
    except ValueError as error:
        raise ValueError(f"{path} is in the layout of {layout.name}, but {error}") from error
    return Weights(path, layout.name, state, left_out, facts)


def _read(path: Path) -> tuple[dict[str, Any], dict[str, str]]:
    """The tensors of a file, and the metadata of a safetensors file."""
    metadata: dict[str, str] = {}
    if _is_torchscript(path):
        raise ValueError(
            f"{path} is a TorchScript archive, which is code: save the state_dict() of torch.jit.load(...)"
        )
    try:
        with torch.serialization.safe_globals([argparse.Namespace]):  # in the checkpoints of timm's script
            state = load_state_dict(str(path), device="cpu", weights_only=True)
        if path.suffix == ".safetensors":
            with safe_open(path, framework="pt") as file:
                metadata = file.metadata() or {}
    except (RuntimeError, EOFError, SafetensorError, pickle.UnpicklingError) as error:
        raise ValueError(f"{path} is not a complete file of weights alone: {_reason(error)}") from error
    return state, metadata


def _is_torchscript(path: Path) -> bool:
    """Whether a file is what `torch.jit.save` writes, as OpenAI's own are."""
    if not zipfile.is_zipfile(path):
        return False
    with zipfile.ZipFile(path) as archive:
        return any(name.endswith("/constants.pkl") for name in archive.namelist())


def _reason(error: Exception) -> str:
    """What torch or safetensors says, without its advice to read the file all the same."""
    lines = str(error.__cause__ or error).splitlines() or ["it ends early"]
    refused = [line.partition(" was not an allowed")[0] for line in lines if "Unsupported" in line]
    return (refused or lines)[0].partition("This file can still be loaded")[0].strip()
