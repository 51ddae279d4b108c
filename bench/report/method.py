"""What the method costs by count, and what the demo found."""

from collections.abc import Callable, Mapping
from typing import Any

from bench.report.markdown import item, paragraph, provenance, table
from bench.report.recorded import Results


def counts(results: Results) -> str:
    """Counted cost of a step, saving by saving."""
    result = results.need("counts")
    columns: dict[str, Callable[[Mapping[str, Any]], str]] = {
        "p": lambda cost: f"{cost['p']:g}",
        "full source": lambda cost: f"{cost['full_source']:.3f}",
        "truncated source": lambda cost: f"{cost['truncated_source']:.3f}",
        "no own K, V": lambda cost: f"{cost['flops_all_rows']:.3f}",
        "class rows": lambda cost: f"**{cost['flops']:.3f}** (max {cost['flops_max']:.3f})",
        "bytes kept": lambda cost: f"**{cost['saved_bytes']:.3f}** (max {cost['saved_bytes_max']:.3f})",
        "with `recompute`": lambda cost: f"**{cost['recomputed_bytes']:.3f}**",
        "source run": lambda cost: f"{cost['source_fraction']:.0%}",
    }
    recomputed = ", and with `recompute=True`"
    if any(
        "recomputed_bytes" not in cost for cost in result["costs"]
    ):  # counted before there was such a thing
        del columns["with `recompute`"]
        recomputed = ""
    text = (
        f"Cost of a training step of `{result['model']}` over that of plain timm fine-tuning, *counted*,",
        "not timed (`python -m bench.counts`). First FLOPs, forward and backward, as savings are added from",
        "left to right; then, with all of them, bytes of activations kept for the",
        f"backward{recomputed}, and how much of the source ran. Exact expectations, and maxima, over all",
        "draws of the coins. Models with average or attention pooling have no class rows to spare: their",
        "FLOPs are those of the column before.",
    )
    rows = [[of(cost) for of in columns.values()] for cost in result["costs"]]
    note = results.stale_note("counts", result)
    return f"{note}{paragraph(*text)}\n\n{table(list(columns), rows)}\n\n<sub>{provenance(result)}</sub>"


def demo(results: Results) -> str:
    """What the demo printed."""
    result = results.need("demo")
    conclusions = "\n".join(item(sentence) for sentence in result["conclusions"])
    return (
        f"{results.stale_note('demo', result)}```text\n{result['table']}\n```\n\n{conclusions}\n\n"
        f"<sub>{result['machine']}; {provenance(result)}; {result['seconds']:.0f} s</sub>"
    )
