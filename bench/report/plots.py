"""Pictures: what is in them, and how they are drawn."""

import hashlib
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import cycle
from pathlib import Path
from typing import Any

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator

from bench.demo.plots import BLUE, GREEN, GREY, ORANGE, PURPLE, STYLE
from bench.digest import digests

CODE = ("bench/report/plots.py", "bench/demo/plots.py")
"""What a picture looks like depends on these."""

# The first that a name begins with; whoever is none of them takes what is left in turn.
FAMILIES = {
    "ours": (BLUE, "o"),
    "plain": (GREY, "s"),
    "by hand": (ORANGE, "^"),
    "as published": (PURPLE, "D"),
}
OTHERS = ((GREEN, "v"), ("#E69F00", "P"), ("#56B4E9", "X"), ("#000000", "*"))
# For the second, third and so on of one look.
MARKERS = "v<>PX*hdp8H"


@dataclass(frozen=True)
class Lines:
    """One line for each name.

    Args:
        title: Above the picture.
        x: What is varied, with its unit.
        y: What is measured, with its unit.
        lines: By name: x and y of each point.
        log_x: Powers of two are equally far apart.
        log_y: Powers of ten are, and the axis need not begin at zero.
    """

    title: str
    x: str
    y: str
    lines: Mapping[str, Sequence[tuple[float, float]]]
    log_x: bool = False
    log_y: bool = False

    def draw(self, axes: Axes) -> None:
        """Lines with a marker at each point."""
        for (name, points), style in zip(self.lines.items(), _styles(self.lines), strict=True):
            axes.plot(*zip(*points, strict=True), label=name, **style)
        if self.log_x:
            axes.set_xscale("log", base=2)
        ticks = sorted({x for points in self.lines.values() for x, _ in points})
        axes.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
        if self.log_y:
            axes.set_yscale("log")
            axes.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
            axes.yaxis.set_major_formatter("{x:g}")
        else:
            axes.set_ylim(0, 1.08 * max(y for points in self.lines.values() for _, y in points))
        axes.minorticks_off()
        axes.set_xlabel(self.x)
        axes.set_ylabel(self.y)
        axes.legend(fontsize=9, loc="upper left", bbox_to_anchor=(1, 1))


@dataclass(frozen=True)
class Bars:
    """One bar for each name, in their order from above.

    Args:
        title: Above the picture.
        x: What is measured, with its unit.
        bars: By name: the value, and half an error bar or None.
    """

    title: str
    x: str
    bars: Mapping[str, tuple[float, float | None]]

    def draw(self, axes: Axes) -> None:
        """Bars with their values."""
        values, errors = zip(*self.bars.values(), strict=True)
        colors = [style["color"] for style in _styles(self.bars)]
        bars = axes.barh(list(self.bars), values, color=colors, xerr=[error or 0.0 for error in errors])
        axes.bar_label(bars, fmt="%.3g", padding=4, fontsize=9)
        axes.margins(x=0.12)
        axes.invert_yaxis()
        axes.grid(visible=False)
        axes.set_xlabel(self.x)


@dataclass(frozen=True)
class Roofline:
    """One point for each name, under the rates of products and, to the left, of memory.

    Args:
        title: Above the picture.
        x: Arithmetic intensity, with its unit.
        y: Rate, with its unit.
        points: By name: x and y.
        roofs: Highest rates, by what they are rates of.
        slope: Rate of memory, in units of y over x; None where it is not known.
        slope_name: What that is.
    """

    title: str
    x: str
    y: str
    points: Mapping[str, tuple[float, float]]
    roofs: Mapping[str, float]
    slope: float | None
    slope_name: str

    def draw(self, axes: Axes) -> None:
        """Points and roofs, on scales of powers of two and of ten."""
        for (name, (x, y)), style in zip(self.points.items(), _styles(self.points), strict=True):
            axes.plot(x, y, **{**style, "linestyle": "none"}, label=name)
        top, ridges = self.top, [roof / self.slope for roof in self.roofs.values()] if self.slope else []
        left = min([*(x for x, _ in self.points.values()), *ridges]) / 2
        right = 2 * max([*(x for x, _ in self.points.values()), *ridges])
        for (name, roof), line in zip(self.roofs.items(), cycle(("-", "--", ":")), strict=False):
            start = roof / self.slope if self.slope else left
            axes.plot([start, right], [roof, roof], line, color=GREY, linewidth=1, label=name)
        if self.slope:
            axes.plot(
                [left, top / self.slope],
                [left * self.slope, top],
                "-.",
                color=GREY,
                linewidth=1,
                label=self.slope_name,
            )
        axes.set_xscale("log", base=2)
        axes.set_yscale("log")
        axes.xaxis.set_major_formatter("{x:g}")
        axes.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
        axes.yaxis.set_major_formatter("{x:g}")
        axes.minorticks_off()
        axes.set_xlabel(self.x)
        axes.set_ylabel(self.y)
        axes.legend(fontsize=9, loc="upper left", bbox_to_anchor=(1, 1))

    @property
    def top(self) -> float:
        """The highest rate in the picture."""
        return max([*self.roofs.values(), *(y for _, y in self.points.values())])


Picture = Lines | Bars | Roofline


def save(picture: Picture, path: Path) -> None:
    """Draw a picture as SVG, which names what it was drawn from."""
    with mpl.rc_context({**STYLE, "svg.hashsalt": path.stem, "axes.titlesize": 11}):
        figure = Figure(figsize=(7.6, 3.9), layout="constrained", facecolor="white")
        axes = figure.add_subplot()
        picture.draw(axes)
        axes.set_title(picture.title)
        figure.savefig(path, format="svg", metadata={"Date": None, "Description": digest(picture)})


def digest(picture: Picture) -> str:
    """Of what is in a picture, and of the code that draws it; versions of matplotlib do not matter."""
    content = json.dumps([type(picture).__name__, asdict(picture), digests(CODE)])
    return f"sha256:{hashlib.sha256(content.encode()).hexdigest()}"


def drawn_from(path: Path) -> str | None:
    """The digest in a picture, None where there is no picture or it has none."""
    found = re.search(r"<dc:description>(sha256:[0-9a-f]{64})<", path.read_text()) if path.exists() else None
    return found[1] if found else None


def _styles(names: Iterable[str]) -> list[dict[str, Any]]:
    """Colour and marker by who it is; what is compiled has a solid line and filled markers."""
    styles: list[dict[str, Any]] = []
    others, used = cycle(OTHERS), set()
    for name in names:
        known = (look for start, look in FAMILIES.items() if name.startswith(start))
        color, marker = next(known, None) or next(others)
        compiled, spare = "compiled" in name, iter(MARKERS)
        while (color, marker, compiled) in used and (following := next(spare, None)):
            marker = following  # whoever comes after all of them looks like the last
        used.add((color, marker, compiled))
        styles.append(
            {
                "color": color,
                "marker": marker,
                "markersize": 5,
                "markerfacecolor": color if compiled else "white",
                "linestyle": "-" if compiled else "--",
                "linewidth": 1.4,
            }
        )
    return styles
