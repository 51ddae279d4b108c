"""Three plots: accuracy, the mechanism and the cost, over p."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from bench.demo.report import Paired, Row

BLUE, ORANGE, GREEN, PURPLE, GREY = "#0072B2", "#D55E00", "#009E73", "#CC79A7", "#555555"
STYLE: dict[Any, Any] = {
    "font.size": 11,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.grid.axis": "y",
    "grid.color": "#dddddd",
    "axes.axisbelow": True,
    "legend.frameon": False,
    "savefig.dpi": 160,
}


def draw_all(rows: Sequence[Row], output: Path) -> list[Path]:
    """Write the plots into an existing folder and return their paths."""
    plots = {"accuracy.png": accuracy, "mechanism.png": mechanism, "cost.png": cost}
    for name, draw in plots.items():
        with mpl.rc_context(STYLE):
            figure = Figure(figsize=(7.2, 4.2), layout="constrained")
            draw(figure, rows)
            figure.savefig(output / name)
    return [output / name for name in plots]


def accuracy(figure: Figure, rows: Sequence[Row]) -> None:
    """Accuracy after training on partly wrong labels, over p, with the controls beside it."""
    axes = figure.add_subplot()
    over_p, controls = _over_p(rows), _controls(rows)
    ticks = [*(_p_label(row) for row in over_p), *(row.name.replace(", ", ",\n") for row in controls)]
    _series(axes, range(len(over_p)), [row.noisy for row in over_p], BLUE, "o-")
    _series(axes, range(len(over_p), len(ticks)), [row.noisy for row in controls], ORANGE, "s")
    axes.axvline(len(over_p) - 0.5, color=GREY, linewidth=0.8, linestyle=":")
    axes.set_xticks(range(len(ticks)), ticks)
    axes.set_xlabel("StochCA's p, and controls")
    axes.set_ylabel("test accuracy, %")
    axes.set_title(f"Partly wrong labels\n{_error_bars(rows[0].noisy)}", fontsize=11)


def mechanism(figure: Figure, rows: Sequence[Row]) -> None:
    """Accuracy where every block reads the source, and of the target alone, after clean labels."""
    axes = figure.add_subplot()
    over_p = _over_p(rows)
    alone = [row.clean for row in over_p if row.clean]
    on_source = [row.clean_on_source for row in over_p if row.clean_on_source]
    _series(axes, range(len(over_p)), alone, GREY, "s--", "target alone", -0.06)
    _series(axes, range(len(over_p)), on_source, BLUE, "o-", "every block reads the source", 0.06)
    axes.set_xticks(range(len(over_p)), [_p_label(row) for row in over_p])
    axes.set_xlabel("StochCA's p in training")
    axes.set_ylabel("test accuracy, %")
    axes.set_title(f"Clean labels\n{_error_bars(alone[0])}", fontsize=11)
    axes.legend(loc="lower right")


def cost(figure: Figure, rows: Sequence[Row]) -> None:
    """Step time, FLOPs and saved bytes relative to plain fine-tuning; share of the source that ran."""
    left, right = figure.subplots(1, 2, width_ratios=[3, 2])
    over_p = _over_p(rows)[1:]
    positions = range(len(over_p))
    quantities: list[tuple[str, str, str, Callable[[Row], float]]] = [
        ("median step time, measured", ORANGE, "s-", lambda row: row.cost.time),
        ("FLOPs, counted", BLUE, "o-", lambda row: row.cost.flops),
        ("saved bytes, counted", GREEN, "^-", lambda row: row.cost.saved_bytes),
    ]
    for label, color, marker, value in quantities:
        left.plot(positions, [value(row) for row in over_p], marker, color=color, label=label)
    left.axhline(1, color=GREY, linewidth=0.8, linestyle=":", label="plain fine-tuning")
    left.set_ylim(bottom=0)
    left.set_ylabel("cost of a step, plain = 1")
    left.legend(loc="lower left")
    right.plot(positions, [100 * row.source_fraction for row in over_p], "D-", color=PURPLE)
    right.set_ylim(0, 100)
    right.set_ylabel("source blocks that ran, %")
    for axes in (left, right):
        axes.set_xticks(positions, [_p_label(row) for row in over_p])
        axes.set_xlabel("StochCA's p")


def _over_p(rows: Sequence[Row]) -> list[Row]:
    """Plain first, then StochCA in the order of p."""
    return [rows[0], *(row for row in rows if row.p is not None)]


def _controls(rows: Sequence[Row]) -> list[Row]:
    return [row for row in rows[1:] if row.p is None]


def _p_label(row: Row) -> str:
    return "plain" if row.p is None else str(row.p)


def _error_bars(quantity: Paired) -> str:
    return f"mean and standard deviation over n = {len(quantity.values)} seeds, which are the small dots"


def _series(
    axes: Axes,
    positions: Sequence[int],
    quantities: Sequence[Paired],
    color: str,
    marker: str,
    label: str | None = None,
    shift: float = 0.0,
) -> None:
    """Mean with standard deviation, and each seed as a small dot beside it."""
    at = [position + shift for position in positions]
    means, stds = [q.mean for q in quantities], [q.std for q in quantities]
    axes.errorbar(at, means, stds, fmt=marker, color=color, capsize=3, label=label)
    for position, quantity in zip(at, quantities, strict=True):
        dots = [position + (0.1 if shift >= 0 else -0.1)] * len(quantity.values)
        axes.plot(dots, quantity.values, ".", color=color, alpha=0.4, markersize=5)
