"""Pieces of a step, each done in several ways, and what a source in float8 changes."""

from bench.report.markdown import device, number, paragraph, provenance, table
from bench.report.recorded import Results, not_measured

WAYS, FLOAT8 = "parts", "float8"


def parts(results: Results) -> str:
    """Times of `bench.parts`."""
    result = results.read(WAYS)
    if result is None:
        return not_measured(WAYS)
    rows = [
        [part["name"], name, number(way["p50_ms"]), f"{way['ratio']:.2f}"]
        for part in result["parts"]
        for name, way in part["ways"].items()
    ]
    intro = paragraph(f"On {device(result)}: medians, and the ratio to the first way.")
    shown = table(["part", "way", "ms", "ratio"], rows, left=2)
    return results.stale_note(WAYS, result) + f"{intro}\n\n{shown}\n\n<sub>{provenance(result)}</sub>"


def float8(results: Results) -> str:
    """Differences that `bench.float8` found."""
    result = results.read(FLOAT8)
    if result is None:
        return not_measured(FLOAT8)
    rows = [
        [
            dtype,
            f"{found['logits']:.2%}",
            f"{found['gradients']:.2%}",
            f"{found['cosine']:.5f}",
            *(f"{min(found[name]):.5f}" for name in "qkv"),
        ]
        for dtype, found in result["differences"].items()
    ]
    intro = paragraph(
        f"One training step of `{result['model']}`, B={result['batch']}, random weights, on",
        f"{device(result)}: differences to the same step in float32. Least cosine of the source's queries,",
        "keys and values is that of the worst block, mean over tokens and heads. Of the blocks,",
        f"{sum(result['coins'])} of {len(result['coins'])} read the source.",
    )
    header = ["source", "logits", "gradients", "their cosine", "least cosine q", "k", "v"]
    shown = table(header, rows)
    return results.stale_note(FLOAT8, result) + f"{intro}\n\n{shown}\n\n<sub>{provenance(result)}</sub>"
