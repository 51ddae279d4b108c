"""Renders the README's tables from recorded results, so that no number in it is typed.

`python -m bench.readme` writes them, `--check` fails if the README says anything else.
"""

import argparse
import json
import re
import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from textwrap import fill
from typing import Any

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


SECTIONS: dict[str, Callable[[dict[str, Any]], str]] = {"counts": counts, "demo": demo}


def render(text: str) -> str:
    """The README with every section filled in from its result."""
    for name, section in SECTIONS.items():
        body = section(json.loads((RESULTS / f"{name}.json").read_text()))
        pattern = rf"(<!-- {name} -->\n).*?(<!-- /{name} -->)"
        match = re.search(pattern, text, flags=re.DOTALL)
        if match is None:
            raise ValueError(f"README.md must have a section <!-- {name} --> ... <!-- /{name} -->")
        text = f"{text[: match.start()]}{match[1]}{body}\n{match[2]}{text[match.end() :]}"
    return text


def main() -> int:
    """Write or check."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true", help="change nothing, exit 1 if the README differs")
    args = parser.parse_args()
    readme = ROOT / "README.md"
    text = readme.read_text()
    rendered = render(text)
    if not args.check:
        readme.write_text(rendered)
    elif rendered != text:
        print("README.md differs from bench/results: run `python -m bench.readme`")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
