"""Plots of an analysis: curves over the blocks, and maps of blocks and heads."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator

from stochca.analysis.measures import (
    CLASS_SIMILARITY,
    DISTANCE,
    DIVERGENCE,
    MEASURES,
    SIMILARITY,
    Measure,
)
from stochca.analysis.results import Analysis, measures_of
from stochca.analysis.style import RC, series
from stochca.checkpoint import write_atomically

# Inches of a panel, of the margins within it, and of a legend.
WIDTH, HEIGHT = 3.6, 2.8
LEFT, RIGHT, BOTTOM, TOP = 0.74, 0.08, 0.48, 0.34
COLOURS = 0.9  # right of a map: its scale
SECOND_LINE = 0.16
LEGEND = 0.24  # a row

# Characters of a run's name that fit above a map, columns of the legend, and labels beside and below a map.
LONGEST_NAME = 26
LEGEND_COLUMNS = 4
MOST_LABELS = 12, 8

# Powers of ten between which ticks are written out.
WRITTEN_OUT = (-2, 4)

DPI = 160

REFERENCES = {"attention_distance_target": "attention_distance_source"}


@dataclass(frozen=True)
class Panel:
    """One set of axes.

    Args:
        draw: Draws it.
        text: What it shows, in words.
        height: In inches.
        right: Margin in inches.
        top: Margin in inches.
    """

    draw: Callable[[Axes], None]
    text: str
    height: float = HEIGHT
    right: float = RIGHT
    top: float = TOP


def curve_panels(analyses: Sequence[Analysis], *groups: str) -> list[Panel]:
    """One panel for each measure of some groups: a line per run over the blocks, and a band of its spread."""
    shown = [m for m in measures_of(analyses) if m.group in groups and m.name not in REFERENCES.values()]
    limits = {group: _limits(analyses, group) for group in groups}
    return [
        Panel(
            partial(_curves, analyses=analyses, measure=measure, limits=limits[measure.group]),
            _curves_in_words(analyses, measure),
        )
        for measure in shown
    ]


def head_panels(analyses: Sequence[Analysis], group: str) -> list[Panel]:
    """One panel for each run and measure of a group: a field per block and head, on one scale of colours."""
    measures = [m for m in measures_of(analyses) if m.group == group]
    limits = _limits(analyses, group, of_heads=True)
    return [
        Panel(
            partial(_fields, analysis=analysis, measure=measure, limits=limits),
            _fields_in_words(analysis, measure),
            _height_of_fields(analysis, measure),
            COLOURS,
            TOP + SECOND_LINE,
        )
        for analysis in analyses
        for measure in measures
        if measure.name in analysis.comparison.measured
    ]


def write_plots(output: Path, analyses: Sequence[Analysis]) -> list[Path]:
    """Write `similarity.png`, `heads.png` and, where it was compared, `attention.png`; return their paths.

    Args:
        output: An existing folder.
        analyses: Of the runs.
    """
    figures = {
        "similarity.png": (curve_panels(analyses, SIMILARITY, CLASS_SIMILARITY), len(analyses)),
        "attention.png": (curve_panels(analyses, DIVERGENCE, DISTANCE), len(analyses)),
        "heads.png": (head_panels(analyses, SIMILARITY), 0),
    }
    paths = []
    for name, (panels, lines) in figures.items():
        if panels:
            figure = _arranged(panels, [analysis.name for analysis in analyses[:lines]])

            def write(file: Path, figure: Figure = figure) -> None:
                figure.savefig(file, format="png", dpi=DPI)

            write_atomically(output / name, write)
            paths.append(output / name)
    return paths


def drawn(panel: Panel) -> Figure:
    """One panel as a figure."""
    with mpl.rc_context(RC):
        figure = Figure(figsize=(WIDTH, panel.height))
        panel.draw(_place(figure, panel, 0.0, 0.0))
    return figure


def _arranged(panels: Sequence[Panel], names: Sequence[str]) -> Figure:
    """Panels in rows of three, with a legend of the runs below."""
    columns = min(3, len(panels))
    rows = -(-len(panels) // columns)
    height = max(panel.height for panel in panels)
    below = LEGEND * (-(-len(names) // LEGEND_COLUMNS) + 0.5) if names else 0.0
    with mpl.rc_context(RC):
        figure = Figure(figsize=(columns * WIDTH, rows * height + below))
        for i, panel in enumerate(panels):
            row, column = divmod(i, columns)
            panel.draw(_place(figure, panel, column * WIDTH, below + (rows - row) * height - panel.height))
        if names:
            handles = [Line2D([], [], label=_shortened(name), **series(i)) for i, name in enumerate(names)]
            figure.legend(
                handles=handles, loc="lower center", ncols=min(LEGEND_COLUMNS, len(names)), frameon=False
            )
    return figure


def _place(figure: Figure, panel: Panel, x: float, y: float) -> Axes:
    """The axes of a panel whose lower left corner is so many inches from that of the figure."""
    width, height = figure.get_size_inches()
    inner = WIDTH - LEFT - panel.right, panel.height - BOTTOM - panel.top
    return figure.add_axes(((x + LEFT) / width, (y + BOTTOM) / height, inner[0] / width, inner[1] / height))


def _curves(axes: Axes, analyses: Sequence[Analysis], measure: Measure, limits: tuple[float, float]) -> None:
    for index, analysis in enumerate(analyses):
        measured = analysis.comparison.measured.get(measure.name)
        if measured is None:
            continue
        style = series(index)
        mean, deviation = measured.blocks.mean, measured.blocks.deviation
        blocks = range(len(mean))
        axes.fill_between(
            blocks, mean - deviation, mean + deviation, color=style["color"], alpha=0.15, linewidth=0
        )
        axes.plot(blocks, mean, **style)
        if (reference := REFERENCES.get(measure.name)) is not None:
            axes.plot(
                blocks,
                analysis.comparison.measured[reference].blocks.mean,
                "--",
                color=style["color"],
                linewidth=1.2,
            )
    axes.set_title(_sentence(f"{measure.title}, {measure.tokens}"))
    axes.set_ylabel(measure.axis)
    axes.set_xlabel("block")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.ticklabel_format(axis="y", scilimits=WRITTEN_OUT)
    axes.set_ylim(*limits)


def _fields(axes: Axes, analysis: Analysis, measure: Measure, limits: tuple[float, float]) -> None:
    values = analysis.comparison.measured[measure.name].heads.mean
    fields = axes.pcolormesh(
        values, cmap="viridis", vmin=limits[0], vmax=limits[1], edgecolors="face", linewidth=0.2
    )
    axes.set_title(f"{_sentence(measure.title)}\n{_shortened(analysis.name)}")
    axes.set_xlabel("head")
    axes.set_ylabel("block")
    axes.invert_yaxis()
    axes.grid(visible=False)
    for axis, count, most in zip((axes.yaxis, axes.xaxis), values.shape, MOST_LABELS, strict=True):
        step = -(-count // most)
        axis.set_ticks(np.arange(0, count, step) + 0.5, [str(i) for i in range(0, count, step)])
    figure = axes.get_figure(root=True)
    assert figure is not None
    scale = axes.inset_axes((1.04, 0.0, 0.05, 1.0))
    figure.colorbar(fields, cax=scale, label=measure.axis).outline.set_visible(False)
    scale.ticklabel_format(scilimits=WRITTEN_OUT)


def _sentence(text: str) -> str:
    return text[0].upper() + text[1:]


def _shortened(name: str) -> str:
    """The end of a name, which tells runs from each other."""
    return name if len(name) <= LONGEST_NAME else "…" + name[1 - LONGEST_NAME :]


def _limits(analyses: Sequence[Analysis], group: str, *, of_heads: bool = False) -> tuple[float, float]:
    """The range that panels of a group share: up to 1 for similarities, from 0 for divergences."""
    values = list(_values(analyses, group, of_heads))
    if not values:
        return (0.0, 1.0)
    low, high = float(min(map(np.min, values))), float(max(map(np.max, values)))
    if group in (SIMILARITY, CLASS_SIMILARITY):
        high = 1.0
    elif group == DIVERGENCE:
        low = 0.0
    # Lines on the edge would be cut, and differences that are none look large.
    air = 0.0 if of_heads else max(0.04 * (high - low), 0.05 * high if group == DISTANCE else 0.005)
    return (low if group == DIVERGENCE else low - air, max(high + air, low + 1e-6))


def _values(analyses: Sequence[Analysis], group: str, of_heads: bool) -> Iterator[np.ndarray]:
    for analysis in analyses:
        for name, measured in analysis.comparison.measured.items():
            if MEASURES[name].group == group:
                if of_heads:
                    yield measured.heads.mean.ravel()
                else:
                    spread = np.nan_to_num(measured.blocks.deviation)
                    yield np.concatenate([measured.blocks.mean - spread, measured.blocks.mean + spread])


def _height_of_fields(analysis: Analysis, measure: Measure) -> float:
    blocks = len(analysis.comparison.measured[measure.name].heads.mean)
    return BOTTOM + TOP + SECOND_LINE + 0.16 * max(blocks, 10)


def _curves_in_words(analyses: Sequence[Analysis], measure: Measure) -> str:
    """The lines of a panel, for those who do not see it."""
    lines = []
    for analysis in analyses:
        if (measured := analysis.comparison.measured.get(measure.name)) is not None:
            mean = measured.blocks.mean
            low, high = mean.argmin(), mean.argmax()
            lines.append(
                f"{analysis.name}: {mean[0]:.3g} in block 0, {mean[-1]:.3g} in block {len(mean) - 1}, "
                f"lowest {mean[low]:.3g} in block {low}, highest {mean[high]:.3g} in block {high}"
            )
    return f"Line plot of {measure.label}, over the blocks. {'. '.join(lines)}."


def _fields_in_words(analysis: Analysis, measure: Measure) -> str:
    values = analysis.comparison.measured[measure.name].heads.mean
    low, high = (np.unravel_index(i, values.shape) for i in (values.argmin(), values.argmax()))
    return (
        f"Map of {measure.label} of {analysis.name}, by block and head: "
        f"lowest {values.min():.3g} in block {low[0]}, head {low[1]}, "
        f"highest {values.max():.3g} in block {high[0]}, head {high[1]}."
    )
