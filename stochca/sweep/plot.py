"""The plot of a sweep: accuracy over p, and beside it the settings that are no number."""

import itertools
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from stochca.checkpoint import write_atomically
from stochca.sweep.options import Metric, Spread
from stochca.sweep.report import METRICS, Row, seeds

BLUE, ORANGE = "#0072B2", "#D55E00"
STYLE: dict[Any, Any] = {
    "font.size": 11,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.grid.axis": "y",
    "grid.color": "#dddddd",
    "axes.axisbelow": True,
    "savefig.dpi": 160,
    "svg.hashsalt": "stochca",
}

# Inches.
WIDTH, HEIGHT = 7.2, 4.2

# Characters of a line of a label, and lines above each other, that fit into an inch.
CHARACTERS, LINES = 13, 6

# Labels that do not fit beside each other in so many lines stand upright, in lines of so many characters.
MOST_LINES = 5
UPRIGHT_LINE = 26


def draw(rows: Sequence[Row], metric: Metric, kind: Spread, output: Path) -> list[Path]:
    """Write `sweep.png` and `sweep.svg` into an existing folder and return their paths.

    Args:
        rows: Of the settings; those without a complete run are left out.
        metric: What is drawn.
        kind: Of the spread.
        output: The folder.
    """
    rows = [row for row in rows if row.estimates[metric].n]
    over_p = sorted((row for row in rows if row.p is not None), key=lambda row: row.p or 0)
    others = [row for row in rows if row.p is None]
    paths = [output / "sweep.png", output / "sweep.svg"]
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(WIDTH, HEIGHT), layout="constrained")
        widths = [width for width in (bool(over_p) * min(1 + len(over_p), 5), min(len(others), 6)) if width]
        panels = figure.subplots(1, len(widths), sharey=True, width_ratios=widths, squeeze=False)[0]
        panels[0].set_ylabel(f"{METRICS[metric]} accuracy, %")
        if over_p:
            _over_p(panels[0], over_p, metric)
        if others:
            _others(panels[-1], others, metric, (WIDTH - 1) * widths[-1] / sum(widths))
        has_spread = any(row.estimates[metric].spread is not None for row in rows)
        text = f"mean and {kind} over {seeds(rows)}, which are the small dots"
        figure.suptitle(text if has_spread else f"{seeds(rows)}, so no {kind}", fontsize=11)
        for path in paths:

            def write(file: Path, path: Path = path) -> None:
                figure.savefig(file, format=path.suffix[1:])

            write_atomically(path, write)
    return paths


def _over_p(axes: Axes, rows: Sequence[Row], metric: Metric) -> None:
    """Mean as a line and spread as a band."""
    at = [row.p or 0.0 for row in rows]
    if len(rows) > 1:
        means, spreads = _means_and_spreads(rows, metric)
        axes.fill_between(at, means - spreads, means + spreads, color=BLUE, alpha=0.15, linewidth=0)
        axes.plot(at, means, "o-", color=BLUE)
        for p, row in zip(at, rows, strict=True):
            _dots(axes, p, row.estimates[metric].values, BLUE)
    else:
        _points(axes, at, rows, metric, BLUE, 0.004)
        axes.set_xticks(at)
        axes.set_xlim(at[0] - 0.05, at[0] + 0.05)
    axes.set_xlabel("p, probability that a block\nattends to the source")


def _others(axes: Axes, rows: Sequence[Row], metric: Metric, width: float) -> None:
    """A labelled point for each, in a panel of some inches."""
    _points(axes, range(len(rows)), rows, metric, ORANGE, 0.12)
    names = [row.name.replace(",", ", ") for row in rows]
    space = width / len(rows)
    line = int(space * CHARACTERS)
    longest_word = max(len(word) for name in names for word in name.split())
    is_upright = line < longest_word or _most_lines(names, line) > MOST_LINES
    if is_upright:
        most = max(1, int(space * LINES))
        line = next(n for n in itertools.count(UPRIGHT_LINE) if _most_lines(names, n) <= most)
        figure = axes.get_figure(root=True)
        assert figure is not None
        figure.set_figheight(HEIGHT - 0.8 + min(line, max(map(len, names))) / CHARACTERS)
    labels = [textwrap.fill(name, line) for name in names]
    axes.set_xticks(range(len(rows)), labels, fontsize=9, rotation=90 if is_upright else 0)
    axes.set_xlim(-0.5, len(rows) - 0.5)


def _most_lines(names: Sequence[str], line: int) -> int:
    return max(len(textwrap.wrap(name, line)) for name in names)


def _points(
    axes: Axes, at: Sequence[float], rows: Sequence[Row], metric: Metric, color: str, beside: float
) -> None:
    """Mean with an error bar, and the seeds beside it."""
    means, spreads = _means_and_spreads(rows, metric)
    axes.errorbar(at, means, spreads, fmt="s", color=color, capsize=3)
    for position, row in zip(at, rows, strict=True):
        _dots(axes, position + beside, row.estimates[metric].values, color)


def _means_and_spreads(rows: Sequence[Row], metric: Metric) -> tuple[np.ndarray, np.ndarray]:
    estimates = [row.estimates[metric] for row in rows]
    # No spread, None, becomes NaN, which is not drawn.
    means = np.array([estimate.mean for estimate in estimates], dtype=float)
    return means, np.array([estimate.spread for estimate in estimates], dtype=float)


def _dots(axes: Axes, at: float, values: Sequence[float], color: str) -> None:
    axes.plot([at] * len(values), values, ".", color=color, alpha=0.5, markersize=6)
