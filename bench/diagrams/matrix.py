"""The matrix of scores with what one program holds of it, and what is said of the program beside it."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal

from bench.diagrams.svg import LINE_HEIGHT, Drawing

WIDTH, SIDE, LEFT, TOP, RIGHT = 780, 300, 66, 84, 410


@dataclass(frozen=True)
class Axis:
    """One side of the matrix of scores.

    Args:
        name: Of its rows.
        length: How many there are.
        tiles: How they are cut; their sum may be more.
        held: Those that one program computes with at a time.
    """

    name: str
    length: int
    tiles: Sequence[int]
    held: Sequence[int]


@dataclass(frozen=True)
class Picture:
    """One program in the matrix of scores, and what is to be said of it.

    Args:
        title: Kernel and case.
        rows: Queries.
        columns: Keys.
        loop: Which way the program goes.
        facts: What it keeps, reads and writes.
    """

    title: str
    rows: Axis
    columns: Axis
    loop: Literal["down", "right"]
    facts: Sequence[tuple[str, str]]


def draw(picture: Picture) -> Drawing:
    """The matrix of scores with one program in it, and the facts beside it."""
    drawing = Drawing(WIDTH, TOP + SIDE + 60, picture.title)
    drawing.text(16, 28, picture.title, "bold")
    ys = _edges(picture.rows.tiles, TOP)
    xs = _edges(picture.columns.tiles, LEFT)
    for j, height in enumerate(_sizes(ys)):
        for i, width in enumerate(_sizes(xs)):
            is_held = j in picture.rows.held and i in picture.columns.held
            drawing.rectangle(xs[i], ys[j], width, height, "target" if is_held else "cell")
    _padding(drawing, picture)
    _names(drawing, picture, xs, ys)
    _loop(drawing, picture, xs, ys)
    y = float(TOP + 8)
    for label, text in picture.facts:
        drawing.text(RIGHT, y, label, "bold")
        y = drawing.paragraph(RIGHT, y + LINE_HEIGHT, text, 50) + 8
    return drawing


def _padding(drawing: Drawing, picture: Picture) -> None:
    """Rows and columns that are computed, and are of no query and no key."""
    useful_rows = SIDE * min(1.0, picture.rows.length / sum(picture.rows.tiles))
    useful_columns = SIDE * min(1.0, picture.columns.length / sum(picture.columns.tiles))
    drawing.rectangle(LEFT + useful_columns, TOP, SIDE - useful_columns, SIDE, "padding")
    drawing.rectangle(LEFT, TOP + useful_rows, useful_columns, SIDE - useful_rows, "padding")


def _names(drawing: Drawing, picture: Picture, xs: Sequence[float], ys: Sequence[float]) -> None:
    drawing.text(
        LEFT + SIDE / 2, TOP - 26, f"{picture.columns.length} {picture.columns.name}", "middle small"
    )
    drawing.text(16, TOP + SIDE + 20, f"{picture.rows.length} {picture.rows.name}", "small")
    for edges, tiles, is_row in ((xs, picture.columns.tiles, False), (ys, picture.rows.tiles, True)):
        shown = "" if len(tiles) <= 7 else f"{tiles[0]}"
        for i, (size, tile) in enumerate(zip(_sizes(edges), tiles, strict=True)):
            middle = edges[i] + size / 2
            is_first_or_last = i in (0, len(tiles) - 1)
            if shown and not is_first_or_last:
                continue
            if is_row:
                drawing.text(LEFT - 8, middle + 4, str(tile), "end small")
            else:
                drawing.text(middle, TOP - 8, str(tile), "middle small")
    drawing.rectangle(LEFT, TOP + SIDE + 32, 26, 14, "target")
    drawing.text(LEFT + 34, TOP + SIDE + 44, "one program, at a time", "small")
    drawing.rectangle(LEFT + 184, TOP + SIDE + 32, 26, 14, "padding")
    drawing.text(LEFT + 218, TOP + SIDE + 44, "padding, computed and masked", "small")


def _loop(drawing: Drawing, picture: Picture, xs: Sequence[float], ys: Sequence[float]) -> None:
    """An arrow through the middle of what the program holds."""
    if picture.loop == "down":
        held = picture.columns.held
        x = (xs[min(held)] + xs[max(held) + 1]) / 2
        drawing.arrow([(x, TOP + 10), (x, TOP + SIDE - 8)])
    else:
        held = picture.rows.held
        y = (ys[min(held)] + ys[max(held) + 1]) / 2
        drawing.arrow([(LEFT + 10, y), (LEFT + SIDE - 8, y)])


def _edges(tiles: Sequence[int], start: float) -> list[float]:
    edges, total = [start], sum(tiles)
    for tile in tiles:
        edges.append(edges[-1] + SIDE * tile / total)
    return edges


def _sizes(edges: Sequence[float]) -> list[float]:
    return [b - a for a, b in pairwise(edges)]
