"""Pieces of Markdown."""

import re
from collections.abc import Iterable, Mapping, Sequence
from math import floor, log10
from textwrap import fill
from typing import Any

NOTHING = "-"
WIDTH = 108


def table(header: Sequence[str], rows: Iterable[Sequence[str]], left: int = 1) -> str:
    """A Markdown table, the first columns left, the others right."""
    ruler = ["---"] * left + ["---:"] * (len(header) - left)
    return "\n".join(f"| {' | '.join(line)} |" for line in [header, ruler, *rows])


def paragraph(*sentences: str, first: str = "", others: str = "") -> str:
    """Sentences in lines of the pages' width, code kept on one line.

    Args:
        sentences: One after another.
        first: Before the first line.
        others: Before all others.
    """
    text = re.sub(r"`[^`]+`", lambda code: code[0].replace(" ", "\0"), " ".join(sentences))
    lines = fill(text, WIDTH, break_long_words=False, break_on_hyphens=False, subsequent_indent=others)
    return first + lines.replace("\0", " ")


def item(text: str) -> str:
    """An item of a list."""
    return paragraph(text, first="- ", others="  ")


def number(value: float, digits: int = 3) -> str:
    """A number with at least so many significant digits, and no exponent."""
    magnitude = floor(log10(abs(float(f"{value:.{digits}g}")))) if value else 0
    return f"{value:.{max(0, digits - 1 - magnitude)}f}"


def not_timed(entry: Mapping[str, Any]) -> str:
    """Why somebody was not timed: the status, and the beginning of the reason as text within a page."""
    line = next(iter((entry.get("reason") or "").strip().splitlines()), "")
    line = line if len(line) <= 200 else f"{line[:200]} ..."
    text = line.replace("<", "&lt;").replace("`", "'")
    return ", ".join(part for part in (f"*{entry['status']}*", text) if part)


def flops_unit(flops: Iterable[float]) -> tuple[float, str]:
    """The unit for some FLOPs, or FLOP/s, and its name."""
    return (1e12, "TFLOP") if max(flops, default=0.0) >= 1e12 else (1e9, "GFLOP")


def provenance(result: Mapping[str, Any]) -> str:
    """Where a result comes from, in a line."""
    versions = ", ".join(
        f"{name} {version}" for name, version in result["versions"].items() if version and name != "stochca"
    )
    return f"{versions}; commit {commit(result)}"


def commit(result: Mapping[str, Any]) -> str:
    """What was measured."""
    changes = " with uncommitted changes" if result["dirty"] else ""
    return (result["commit"] or "unknown")[:12] + changes


def device(result: Mapping[str, Any]) -> str:
    """What it was measured on, with its driver."""
    gpu = _gpu(result)
    return f"{gpu['name']}, driver {gpu['driver']}, CUDA {gpu['cuda']}" if gpu else result["machine"]


def device_name(result: Mapping[str, Any]) -> str:
    """What it was measured on."""
    gpu = _gpu(result)
    return gpu["name"] if gpu else result["machine"]


def _gpu(result: Mapping[str, Any]) -> Mapping[str, Any] | None:
    return None if result.get("device") == "cpu" else result.get("gpu")
