"""Colours and markers of the plots, in files and in a report that follows the reader's light or dark."""

from typing import Any

# Of the runs, on white and on black, apart for colour-blind readers too.
SERIES = (
    ("#0072b2", "#56b4e9"),
    ("#d55e00", "#f2925a"),
    ("#00825f", "#3fcf9f"),
    ("#a3468a", "#e39cc9"),
    ("#7d6a00", "#dcc94a"),
    ("#56606b", "#b4bec9"),
)
MARKERS = "osD^vP"

# Text, axes and lines of reference; grid.
INK, GRID = ("#1f2328", "#e6e9ec"), ("#dadee2", "#363c43")

RC: dict[Any, Any] = {
    "font.size": 10,
    "axes.titlesize": 10.5,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.grid.axis": "y",
    "axes.axisbelow": True,
    "grid.color": GRID[0],
    "lines.linewidth": 1.8,
    "lines.markersize": 4.5,
    "svg.hashsalt": "stochca",
    **dict.fromkeys(
        ("text.color", "axes.labelcolor", "axes.edgecolor", "axes.titlecolor", "xtick.color", "ytick.color"),
        INK[0],
    ),
}


def series(index: int) -> dict[str, Any]:
    """How the line of a run is drawn: colours and markers go round together only after 30 runs."""
    turn = index // len(SERIES)
    return {"color": SERIES[index % len(SERIES)][0], "marker": MARKERS[(index + turn) % len(MARKERS)]}


def themed(svg: str) -> str:
    """An SVG whose colours change with the reader's preference for light or dark."""
    names = {pair: f"--c{i}" for i, pair in enumerate((INK, GRID, *SERIES))}
    for pair, name in names.items():
        svg = svg.replace(pair[0], f"var({name})")

    def root(which: int) -> str:
        return ":root{" + ";".join(f"{name}:{pair[which]}" for pair, name in names.items()) + "}"

    style = f"<style>{root(0)}@media (prefers-color-scheme:dark){{{root(1)}}}</style>"
    start = svg.index("<svg")
    end = svg.index(">", start) + 1
    return svg[start:end] + style + svg[end:]
