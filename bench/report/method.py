"""What the method costs by count, and what the demo found."""

from bench.report.markdown import item, provenance, table
from bench.report.recorded import Results


def counts(results: Results) -> str:
    """Counted cost of a step, saving by saving."""
    result = results.need("counts")
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
        f"{results.stale_note('counts', result)}"
        f"Cost of a training step of `{result['model']}` over that of plain timm fine-tuning, *counted*,\n"
        "not timed (`python -m bench.counts`). First FLOPs, forward and backward, as savings are added from\n"
        "left to right; then, with all of them, bytes of activations kept for the backward, and how much of\n"
        "the source ran. Exact expectations, and maxima, over all draws of the coins. Models with average\n"
        "or attention pooling have no class rows to spare: their FLOPs are those of the column before.\n\n"
        f"{table(header, rows)}\n\n<sub>{provenance(result)}</sub>"
    )


def demo(results: Results) -> str:
    """What the demo printed."""
    result = results.need("demo")
    conclusions = "\n".join(item(sentence) for sentence in result["conclusions"])
    return (
        f"{results.stale_note('demo', result)}```text\n{result['table']}\n```\n\n{conclusions}\n\n"
        f"<sub>{result['machine']}; {provenance(result)}; {result['seconds']:.0f} s</sub>"
    )
