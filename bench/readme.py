"""Renders the tables of README and documentation from recorded results: no number in them is typed.

`python -m bench.readme` writes them, `--check` fails if a page says anything else.
"""

import argparse
import json
import re
import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from textwrap import fill
from typing import Any

from bench import predictions

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "bench" / "results"


def table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A Markdown table, first column left, the others right."""
    lines = [header, ["---"] + ["---:"] * (len(header) - 1), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def provenance(result: dict[str, Any]) -> str:
    """Where a result comes from, in a line."""
    versions = ", ".join(
        f"{name} {version}" for name, version in result["versions"].items() if version and name != "stochca"
    )
    commit = (result["commit"] or "unknown")[:12] + (" with uncommitted changes" if result["dirty"] else "")
    return f"{versions}; commit {commit}"


def counts(result: dict[str, Any]) -> str:
    """Counted cost of a step, saving by saving."""
    header = ["p", "full source", "truncated source", "no own K, V", "class rows", "bytes kept", "source run"]
    rows = [
        [
            f"{cost['p']:g}",
            f"{cost['full_source']:.3f}",
            f"{cost['truncated_source']:.3f}",
            f"{cost['flops_all_rows']:.3f}",
            f"**{cost['flops']:.3f}** (max {cost['flops_max']:.3f})",
            f"**{cost['saved_bytes']:.3f}** (max {cost['saved_bytes_max']:.3f})",
            f"{cost['source_fraction']:.0%}",
        ]
        for cost in result["costs"]
    ]
    return (
        f"Cost of a training step of `{result['model']}` over that of plain timm fine-tuning, *counted*,\n"
        "not timed (`python -m bench.counts`). First FLOPs, forward and backward, as savings are added from\n"
        "left to right; then, with all of them, bytes of activations kept for the backward, and how much of\n"
        "the source ran. Exact expectations, and maxima, over all draws of the coins. Models with average\n"
        "or attention pooling have no class rows to spare: their FLOPs are those of the column before.\n\n"
        f"{table(header, rows)}\n\n<sub>{provenance(result)}</sub>"
    )


def demo(result: dict[str, Any]) -> str:
    """What the demo printed."""
    conclusions = "\n".join(
        f"- {fill(sentence, width=108, subsequent_indent='  ')}" for sentence in result["conclusions"]
    )
    return (
        f"```text\n{result['table']}\n```\n\n{conclusions}\n\n"
        f"<sub>{result['machine']}; {provenance(result)}; {result['seconds']:.0f} s</sub>"
    )


def programs(result: dict[str, Any]) -> str:
    """What each row of the tile table needs, one table for each GPU; inputs with equal figures in one row."""
    header = [
        "kernel",
        "inputs",
        "tile",
        "warps",
        "stages",
        "shape",
        "registers",
        "spilled",
        "shared",
        "WGMMA",
    ]
    tables = []
    for gpu in dict.fromkeys(program["name"].split("-")[1] for program in result["programs"]):
        inputs: dict[tuple[str, ...], list[str]] = {}
        for program in result["programs"]:
            kernel, of, arithmetic, tile, *shape = program["name"].split("-")
            if of == gpu:
                limit = program["shared_limit"]
                figures = (
                    program[key] for key in ("warps", "stages", "registers", "spills", "shared", "wgmma")
                )
                row = (f"`{kernel}`", tile, " ".join(shape), *map(str, figures))
                inputs.setdefault(row, []).append(arithmetic)
        rows = [
            [kernel, ", ".join(names), tile, warps, stages, shape, registers, spilled, shared, wgmma]
            for (
                kernel,
                tile,
                shape,
                warps,
                stages,
                registers,
                spilled,
                shared,
                wgmma,
            ), names in inputs.items()
        ]
        tables.append(f"**{gpu}**, {limit} bytes of shared memory for a program\n\n{table(header, rows)}")
    return "\n\n".join([*tables, f"<sub>{provenance(result)}</sub>"])


def prediction() -> str:
    """What arithmetic says of the goals."""
    return table(predictions.HEADER, predictions.rows())


def recorded(name: str) -> dict[str, Any]:
    """A result from `bench/results`."""
    return json.loads((RESULTS / f"{name}.json").read_text())


PAGES: dict[str, dict[str, Callable[[], str]]] = {
    "README.md": {"counts": lambda: counts(recorded("counts")), "demo": lambda: demo(recorded("demo"))},
    "docs/kernels.md": {"prediction": prediction, "programs": lambda: programs(recorded("programs"))},
}


def render(page: str) -> str:
    """A page with every section filled in."""
    text = (ROOT / page).read_text()
    for name, section in PAGES[page].items():
        pattern = rf"(<!-- {name} -->\n).*?(<!-- /{name} -->)"
        match = re.search(pattern, text, flags=re.DOTALL)
        if match is None:
            raise ValueError(f"{page} must have a section <!-- {name} --> ... <!-- /{name} -->")
        text = f"{text[: match.start()]}{match[1]}{section()}\n{match[2]}{text[match.end() :]}"
    return text


def main() -> int:
    """Write or check."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true", help="change nothing, exit 1 if a page differs")
    args = parser.parse_args()
    differing = [page for page in PAGES if render(page) != (ROOT / page).read_text()]
    for page in differing:
        if args.check:
            print(f"{page} differs from bench/results: run `python -m bench.readme`")
        else:
            (ROOT / page).write_text(render(page))
    return 1 if differing and args.check else 0


if __name__ == "__main__":
    sys.exit(main())
