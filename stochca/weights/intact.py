"""Files of tensors, read only where they are whole, hold numbers and need no code to be run.

A safetensors file cannot tell that a value in it has changed. Those that are written here carry a SHA-256 of
their metadata and tensors, as the entry "sha256" of the metadata, which other readers pass over: it takes
about 0.7 ms per MB, and is what `sha256sum`, git and the Hugging Face hub speak of as well. It guards against
accidents: whoever changes a file on purpose can renew it.

What `torch.save` writes is a zip archive with a CRC-32 of each record, which `torch.load` does not look at.
"""

import hashlib
import json
import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

DIGEST = "sha256"

SAFE_TORCH = "2.10"
"""The first release of torch in which no known file gets around `weights_only=True` (CVE-2026-24747)."""


def digest_of(tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> str:
    """SHA-256 of named tensors, with their dtypes and shapes, and of metadata."""
    about = {name: [str(tensor.dtype), list(tensor.shape)] for name, tensor in tensors.items()}
    sha = hashlib.sha256(json.dumps([about, dict(metadata)], sort_keys=True).encode())
    for name in sorted(tensors):
        sha.update(tensors[name].detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return sha.hexdigest()


def read_safetensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The tensors of a safetensors file, and its metadata without the digest, which is checked if there.

    Raises:
        ValueError: The file is not complete, or has changed since it was written.
    """
    try:
        with safe_open(path, framework="pt") as file:
            metadata = dict(file.metadata() or {})
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (no mapping)
    except OSError:
        raise
    except Exception as error:  # which of them depends on what the file has where a number should be
        raise ValueError(f"{path} is not a complete safetensors file: {error}") from error
    wanted = metadata.pop(DIGEST, None)
    if wanted is not None and wanted != (found := digest_of(tensors, metadata)):
        raise ValueError(
            f"{path} is damaged: its {DIGEST} is {found[:12]}..., it says {wanted[:12]}...; something in it "
            "has changed since it was written"
        )
    return tensors, metadata


def read_pickled(path: Path, classes: Sequence[type] = ()) -> Any:
    """What `torch.save` wrote, as long as it is tensors and plain values; on the CPU.

    Args:
        path: The file.
        classes: That may be in it as well.

    Raises:
        ValueError: The file is not complete, or needs code to be run.
    """
    check_archive(path)
    try:
        with torch.serialization.safe_globals(list(classes)):
            return torch.load(path, map_location="cpu", weights_only=True)
    except OSError:
        raise
    except Exception as error:  # any, from a pickle that somebody made up
        raise ValueError(f"{path} is not a complete file of weights alone: {_reason(error)}") from error


def check_archive(path: Path, *, compressed: bool = False) -> None:
    """Check each record of a file that is a zip archive, as those of torch and NumPy are.

    Args:
        path: The file.
        compressed: Records may be.

    Raises:
        ValueError: A record has changed since it was written, is compressed, or is the code of TorchScript.
    """
    with open(path, "rb") as file:
        if file.read(2) != b"PK":
            return  # not one, which is for the reader to say
    try:
        with zipfile.ZipFile(path) as archive:
            records = archive.infolist()
            names = [record.filename for record in records]
            is_checked = any(record.CRC for record in records if record.file_size)
            is_packed = (
                any(record.compress_type != zipfile.ZIP_STORED for record in records) and not compressed
            )
            # Archives of torch can be written without sums, and compressed ones could be of any size.
            damaged = archive.testzip() if is_checked and not is_packed else None
    except OSError:
        raise
    except Exception as error:  # zipfile's own, and those of what it unpacks numbers with
        raise ValueError(f"{path} is not a complete file of weights alone: {error}") from error
    if any(name.endswith("/constants.pkl") for name in names):
        raise ValueError(
            f"{path} is a TorchScript archive, which is code: save the state_dict() of torch.jit.load(...)"
        )
    if is_packed:
        raise ValueError(f"{path} is a compressed archive, which torch.save does not write")
    if damaged is not None:
        raise ValueError(f"{path} is damaged: {damaged} in it has changed since it was written")


def check_torch(path: Path) -> None:
    """Refuse a pickle of somebody else where this torch can be made to run code by one.

    Raises:
        ValueError: This torch is too old.
    """
    if torch.__version__ < SAFE_TORCH:
        raise ValueError(
            f"{path} is a pickle, which torch before {SAFE_TORCH} does not read safely (CVE-2026-24747), got "
            f"torch {torch.__version__}: update it, or save the weights as .safetensors"
        )


def check_numbers(tensors: Mapping[str, Any], where: str) -> None:
    """Raise a ValueError that names the first tensor with a value that is not finite."""
    for name, tensor in tensors.items():
        if isinstance(tensor, Tensor) and tensor.is_floating_point():
            numbers = tensor.float() if tensor.element_size() == 1 else tensor
            if bad := int((~numbers.isfinite()).sum()):
                raise ValueError(f"{where}: {name} holds {bad} values that are not finite")


def _reason(error: Exception) -> str:
    """What torch says, without its advice to read the file all the same."""
    lines = str(error.__cause__ or error).splitlines() or ["it ends early"]
    refused = [line.partition(" was not an allowed")[0] for line in lines if "Unsupported" in line]
    return (refused or lines)[0].partition("This file can still be loaded")[0].strip()
