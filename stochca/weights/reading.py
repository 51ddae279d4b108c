"""Files of weights in any layout that is known, read without running code that is in them."""

import argparse
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from timm.models import clean_state_dict
from torch import Tensor

from stochca.weights.facts import Facts, facts_of
from stochca.weights.intact import (
    check_archive,
    check_numbers,
    check_torch,
    read_pickled,
    read_safetensors,
)
from stochca.weights.layouts import State, layout_of, shortened

JAX = "JAX"

# What training scripts put around weights, the ones to prefer first; as timm has it.
_WRAPPERS = ("state_dict_ema", "model_ema", "state_dict", "model")


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
        ValueError: It is damaged, needs code to be run, is of no layout that is known, holds values that are
            not finite, or is a pickle and torch older than 2.10.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path} is not a file")
    if path.suffix == ".npz":
        check_archive(path, compressed=True)
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
    check_numbers(state, str(path))
    return Weights(path, layout.name, state, left_out, facts)


def _read(path: Path) -> tuple[dict[str, Any], dict[str, str]]:
    """The tensors of a file, and the metadata of a safetensors file."""
    content: Any
    metadata: dict[str, str] = {}
    if path.suffix == ".safetensors":
        content, metadata = read_safetensors(path)
    else:
        check_torch(path)
        content = read_pickled(path, [argparse.Namespace])  # which is in the checkpoints of timm's script
    for key in _WRAPPERS:
        if isinstance(content, Mapping) and content.get(key) is not None:
            content = content[key]
            break
    if not isinstance(content, Mapping) or not all(isinstance(name, str) for name in content):
        raise ValueError(f"{path} holds no tensors by name, but {type(content).__name__}")
    return clean_state_dict(dict(content)), metadata
