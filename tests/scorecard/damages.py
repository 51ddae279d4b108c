"""Ways to damage a file of weights."""

import json
import struct
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor


def truncated(whole: bytes, count: int, seed: int = 0) -> Iterator[tuple[str, bytes]]:
    """The file up to a random place."""
    for size in np.random.default_rng(seed).integers(0, len(whole), count):
        yield f"cut at {size}", whole[:size]


def flipped(
    whole: bytes, count: int, seed: int = 0, within: int | None = None
) -> Iterator[tuple[str, bytes]]:
    """One bit is another, anywhere or in the first bytes."""
    generator = np.random.default_rng(seed)
    for place in generator.integers(0, within or len(whole), count):
        bit = int(generator.integers(8))
        content = bytearray(whole)
        content[place] ^= 1 << bit
        yield f"bit {bit} of byte {place}", bytes(content)


def zeroed(whole: bytes, count: int, seed: int = 0) -> Iterator[tuple[str, bytes]]:
    """A block of 64 to 4,096 bytes is zero, as of a sector that was never written."""
    generator = np.random.default_rng(seed)
    made = 0
    while made < count:
        size = int(2 ** generator.integers(6, 13))
        place = int(generator.integers(0, max(1, len(whole) - size)))
        content = whole[:place] + bytes(size) + whole[place + size :]
        if content != whole:
            made += 1
            yield f"{size} bytes from {place} are zero", content


def not_weights() -> dict[str, bytes]:
    """Whole files of something else."""
    return {
        "empty": b"",
        "text": b"weights: see the other folder\n",
        "html": b"<!DOCTYPE html><title>404 Not Found</title>",
        "json": b'{"error": "Repository not found"}',
        "lfs": b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 346284714\n",
        "zeros": bytes(4096),
        "png": b"\x89PNG\r\n\x1a\n" + bytes(64),
        "zip": b"PK\x05\x06" + bytes(18),
    }


def other_states(state: Mapping[str, Tensor]) -> Iterator[tuple[str, dict[str, Tensor]]]:
    """State dicts that are not of the model: names, shapes, kinds and values."""
    names = list(state)
    weight = next(name for name in names if name.endswith("mlp.fc1.weight"))
    for name in names[:: max(1, len(names) // 6)]:
        rest = {key: tensor for key, tensor in state.items() if key != name}
        yield f"without {name}", rest
        yield f"{name} renamed", {**rest, f"{name}_": state[name]}
        yield f"{name} longer", {**state, name: torch.cat([state[name], state[name]])}
        yield f"{name} of one number", {**state, name: torch.zeros(1)}
    yield "one more", {**state, "blocks.9.norm1.weight": torch.ones(48)}
    yield "transposed", {**state, weight: state[weight].T.contiguous()}
    yield "flat", {**state, weight: state[weight].flatten()}
    yield "whole numbers", {**state, weight: (10 * state[weight]).to(torch.int8)}
    yield "truths", {**state, weight: state[weight] > 0}
    for value in (float("nan"), float("inf"), -float("inf")):
        spoilt = state[weight].clone()
        spoilt[0, 0] = value
        yield f"a value is {value}", {**state, weight: spoilt}
    yield "nothing", {}
    yield "blocks of another depth", {key: t for key, t in state.items() if not key.startswith("blocks.1.")}
    yield "prefixed", {f"encoder.{key}": tensor for key, tensor in state.items()}


def headers(whole: bytes) -> Iterator[tuple[str, bytes]]:
    """A safetensors file with a header that somebody made up."""
    size = struct.unpack("<Q", whole[:8])[0]
    header: dict[str, Any] = json.loads(whole[8 : 8 + size])
    data = whole[8 + size :]
    first, second, *_ = (name for name in header if name != "__metadata__")

    def changed(**changes: Any) -> bytes:
        return _with_header(json.dumps({**header, **changes}).encode(), data)

    def entry(name: str, **changes: Any) -> dict[str, Any]:
        return {name: {**header[name], **changes}}

    start, end = header[first]["data_offsets"]
    for length in (0, 1, 7, size - 1, size + 1, 2**31, 2**63, 2**64 - 1):
        yield f"length {length}", struct.pack("<Q", length) + whole[8:]
    yield "overlapping", changed(**entry(second, data_offsets=header[first]["data_offsets"]))
    yield "backwards", changed(**entry(first, data_offsets=[end, start]))
    yield "beyond the end", changed(**entry(first, data_offsets=[start + 2**40, end + 2**40]))
    yield "negative", changed(**entry(first, data_offsets=[-8, end]))
    yield "negative shape", changed(**entry(first, shape=[-1, 48]))
    yield "huge shape", changed(**entry(first, shape=[2**62, 2**62]))
    yield "overflowing shape", changed(**entry(first, shape=[2**32, 2**32]))
    yield "fractional shape", changed(**entry(first, shape=[1.5]))
    yield "unknown dtype", changed(**entry(first, dtype="F31"))
    yield "dtype of another size", changed(**entry(first, dtype="F16"))
    yield "dtype of the same size", changed(**entry(first, dtype="I32"))
    yield "no dtype", changed(**{first: {"shape": [1], "data_offsets": [0, 4]}})
    yield "not a dict", changed(**{first: [1, 2, 3]})
    yield "metadata of numbers", changed(__metadata__={"step": 3})
    yield "metadata of lists", changed(__metadata__=[["a", "b"]])
    text = json.dumps(header).encode()
    double = json.dumps(entry(first, data_offsets=header[second]["data_offsets"])).encode()
    yield "a name twice", _with_header(text[:-1] + b", " + double[1:], data)
    yield "deep", _with_header(b'{"a":' * 50_000 + b"1" + b"}" * 50_000, data)
    yield "many names", _with_header(b"{" + b",".join(b'"%d":{}' % i for i in range(100_000)) + b"}", data)
    yield "long name", _with_header(b'{"' + b"a" * 1_000_000 + b'":{}}', data)
    yield "not text", _with_header(b"\xff\xfe" * 50, data)
    yield "data at the end", whole + b"PK"
    yield "a list", _with_header(b"[]", data)


def _with_header(text: bytes, data: bytes) -> bytes:
    return struct.pack("<Q", len(text)) + text + data
