"""The numbers of an analysis as CSV, and the means of each run as a table."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from stochca.analysis.measures import Measure
from stochca.analysis.moments import Estimate
from stochca.analysis.results import Analysis, measures_of
from stochca.checkpoint import save_metrics
from stochca.statistics import NOTHING, markdown_table

# By unit.
DIGITS = {"": ".3f", "bits": ".4f", "px": ".1f"}


def write_tables(output: Path, analyses: Sequence[Analysis]) -> None:
    """Write `runs.csv`, `blocks.csv` and `heads.csv`: one row per number, with its standard deviation.

    Args:
        output: An existing folder.
        analyses: Of the runs.
    """
    for level in ("runs", "blocks", "heads"):
        save_metrics(output / f"{level}.csv", list(_rows(analyses, level)))


def _rows(analyses: Sequence[Analysis], level: str) -> Iterator[dict[str, Any]]:
    attribute, axes = {
        "runs": ("model", ()),
        "blocks": ("blocks", ("block",)),
        "heads": ("heads", ("block", "head")),
    }[level]
    for analysis in analyses:
        for name, measured in analysis.comparison.measured.items():
            estimate: Estimate = getattr(measured, attribute)
            for index in np.ndindex(estimate.mean.shape):
                yield {
                    "run": analysis.name,
                    "measure": name,
                    **dict(zip(axes, index, strict=True)),
                    "images": analysis.comparison.images,
                    "mean": float(estimate.mean[index]),
                    "standard_deviation": float(estimate.deviation[index]),
                }


def shown(measure: Measure, mean: float, deviation: float) -> str:
    """A mean and its standard deviation, in the unit of the measure."""
    digits = DIGITS[measure.unit]
    return f"{mean:{digits}} ± {NOTHING if np.isnan(deviation) else format(deviation, digits)}"


def means(analyses: Sequence[Analysis]) -> tuple[list[Measure], list[list[str]]]:
    """The means of each run over images, heads and blocks: the columns after the first, and the rows."""
    measures = list(measures_of(analyses))
    rows = []
    for analysis in analyses:
        measured = analysis.comparison.measured
        cells = [
            shown(m, *map(float, (measured[m.name].model.mean, measured[m.name].model.deviation)))
            if m.name in measured
            else NOTHING
            for m in measures
        ]
        rows.append([analysis.name, *cells])
    return measures, rows


def markdown(analyses: Sequence[Analysis]) -> str:
    """The means of each run, with what the spread is below."""
    measures, rows = means(analyses)
    # By rows what a terminal is too narrow for by columns.
    cells = [[measure.label, *(row[i + 1] for row in rows)] for i, measure in enumerate(measures)]
    return f"{markdown_table(['', *(row[0] for row in rows)], cells)}\n\n{caption(analyses)}\n"


def caption(analyses: Sequence[Analysis]) -> str:
    """What the numbers are."""
    counts = sorted({analysis.comparison.images for analysis in analyses})
    return (
        f"Mean ± sample standard deviation (n - 1) over n = {' or '.join(map(str, counts))} images, each by "
        "its mean over heads and blocks. The spread is that of images, not of seeds or of the mean."
    )
