"""Where a measurement was made."""

import os
import platform
import subprocess
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from bench.digest import digests

# What a step runs, apart from the operator.
METHOD = (
    "stochca/__init__.py",
    "stochca/attention.py",
    "stochca/block.py",
    "stochca/compile.py",
    "stochca/lora.py",
    "stochca/model.py",
    "stochca/plan.py",
    "stochca/precision.py",
    "stochca/qkv.py",
    "stochca/recompute.py",
    "stochca/timm_interface.py",
    "stochca/vit.py",
)
PACKAGES = ("stochca", "torch", "triton", "timm", "scikit-learn")


def environment(measured: Sequence[str] = ()) -> dict[str, Any]:
    """Machine, GPU, versions, and the commit measured, with `dirty` true where measured files differ from it.

    Commit and `dirty` are None outside a git checkout, the GPU where there is none, and the version of a
    package that is not installed.

    Args:
        measured: The code that the result depends on, files and folders relative to the root of the
            repository; without any, all of it. "code" has a digest of each: by it `bench.report` knows a
            result that is older than its code.
    """
    commit, changes = _git("rev-parse", "HEAD"), _git("status", "--porcelain", "--", *measured)
    return {
        "machine": f"{_processor()}, {os.cpu_count()} cores, {platform.system()} {platform.machine()}",
        "gpu": _gpu(),
        "versions": {"python": platform.python_version(), **{name: _version(name) for name in PACKAGES}},
        "commit": commit,
        "dirty": None if changes is None else bool(changes),
        "code": digests(measured),
    }


def _gpu() -> dict[str, Any] | None:
    """Name, driver and libraries of the current GPU."""
    if not torch.cuda.is_available():
        return None
    properties = torch.cuda.get_device_properties(torch.cuda.current_device())
    drivers = _output("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader")
    return {
        "name": properties.name,
        "multiprocessors": properties.multi_processor_count,
        "l2_bytes": properties.L2_cache_size,
        "driver": drivers.splitlines()[0] if drivers else None,
        "cuda": torch.version.cuda,
        "cudnn": torch.backends.cudnn.version(),
    }


def _processor() -> str:
    """Name of the processor; Linux keeps it where `platform` does not look."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor()


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _git(*arguments: str) -> str | None:
    return _output("git", "-C", str(Path(__file__).parents[1]), *arguments)


def _output(*command: str) -> str | None:
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None
