"""Whether two folders hold the same run, bit for bit."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

# Times, and what a resumed run may change.
FREE = {"seconds", "images_per_second", "output", "resume", "workers"}


def check_same_run(output: Path, expected: Path) -> None:
    """Raise an AssertionError that names what differs: files, weights, metrics, or state of the trainer."""
    ours, theirs = _contents(output), _contents(expected)
    differing = list(_differences(ours, theirs))
    if differing:
        shown = ", ".join(differing[:5])
        raise AssertionError(f"{len(differing)} things differ from the uninterrupted run: {shown}")


def _contents(output: Path) -> dict[str, Any]:
    import csv

    import torch
    from safetensors import safe_open

    contents: dict[str, Any] = {}
    for path in sorted(output.iterdir()):
        if path.suffix == ".safetensors":
            with safe_open(path, framework="pt") as file:
                tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 (no mapping)
                contents[path.name] = {"tensors": tensors, "metadata": file.metadata()}
        elif path.suffix == ".pt":
            contents[path.name] = torch.load(path, weights_only=True)
        elif path.suffix == ".json":
            contents[path.name] = json.loads(path.read_text())
        elif path.suffix == ".csv":
            with path.open() as rows:
                contents[path.name] = list(csv.DictReader(rows))
        else:  # the options, and what should not be there
            contents[path.name] = None
    return contents


def _differences(ours: Any, theirs: Any, where: str = "") -> Iterator[str]:
    import torch

    if isinstance(theirs, dict) and isinstance(ours, dict):
        for key in sorted({*ours, *theirs} - FREE, key=str):
            if key in ours and key in theirs:
                yield from _differences(ours[key], theirs[key], f"{where}/{key}")
            else:
                yield f"{where}/{key} {'is missing' if key in theirs else 'is too much'}"
    elif isinstance(theirs, list | tuple) and len(ours) == len(theirs):
        for index, (our, their) in enumerate(zip(ours, theirs, strict=True)):
            yield from _differences(our, their, f"{where}/{index}")
    elif isinstance(theirs, torch.Tensor):
        if not (isinstance(ours, torch.Tensor) and torch.equal(ours, theirs)):
            yield where
    elif ours != theirs:
        yield where
