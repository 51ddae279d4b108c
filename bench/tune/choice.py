"""The fastest candidate of each row, and the rows as the tables have them."""

import math
from collections.abc import Mapping, Sequence

from bench.tune.candidates import Candidate
from bench.tune.timing import Timed
from stochca_kernels.dispatch import Winner
from stochca_kernels.tiles import Tiles

Key = tuple[str, str, str]
Columns = tuple[tuple[Tiles, ...], tuple[Tiles, ...]]


def fastest(timed: Mapping[str, Sequence[Timed]]) -> tuple[int, float] | None:
    """Which candidate has the smallest geometric mean of its median times, in microseconds.

    Args:
        timed: For each use and shape, every candidate. One that any of them refused is out.

    Returns:
        Its index and that mean; None where nobody has all times.
    """
    means = {}
    for i, each in enumerate(zip(*timed.values(), strict=True)):
        if each and all(t.times for t in each):
            means[i] = math.exp(sum(math.log(t.times["p50_us"]) for t in each) / len(each))
    best = min(means, key=means.__getitem__, default=None)
    return None if best is None else (best, means[best])


def column(
    present: Sequence[Tiles], chosen: Mapping[int | None, Candidate], origin: str
) -> tuple[Tiles, ...]:
    """Rows of one column of the table.

    Args:
        present: Its rows now: they stay for numbers of keys that were not tuned.
        chosen: Tiles by the most keys they are for; None for a kernel that loses to others.
        origin: The GPU and the commit.
    """
    bounds = {row.max_keys for row in present} | set(chosen)
    found: list[Tiles] = []
    for bound in sorted(bounds, key=lambda n: math.inf if n is None else n):
        tiles = chosen[bound] if bound in chosen else _row_for(present, bound)
        if tiles is not None:
            found.append(tiles._replace(max_keys=bound, origin=origin if bound in chosen else tiles.origin))
    # One row where two that follow each other are the same.
    last = len(found) - 1
    return tuple(
        row
        for i, row in enumerate(found)
        if i == last or row._replace(max_keys=None) != found[i + 1]._replace(max_keys=None)
    )


def _row_for(present: Sequence[Tiles], length: int | None) -> Tiles | None:
    fitting = (
        row for row in present if row.max_keys is None or (length is not None and length <= row.max_keys)
    )
    return next(fitting, None)


def format_tiles(row: Tiles) -> str:
    """A row as it is written in the table, without what is at its default."""
    text = f'Tiles({row.block_m}, {row.block_n}, {row.num_warps}, {row.num_stages}, "{row.origin}"'
    for name, default in Tiles._field_defaults.items():
        if getattr(row, name) != default:
            text += f", {name}={getattr(row, name)!r}"
    return text + ")"


def format_row(key: Key, columns: Columns) -> list[str]:
    """Lines to paste into `stochca_kernels.tiles._TABLE`."""
    names = ", ".join(f'"{part}"' for part in key)
    lines = [f"    ({names}): ("]
    for rows in columns:
        lines += ["        (", *(f"            {format_tiles(row)}," for row in rows), "        ),"]
        if not rows:
            lines[-2:] = ["        (),"]
    return [*lines, "    ),"]


def format_winner(kind: str, gpu: str, most_keys: int | None, winner: Winner) -> str:
    """A line to paste into `stochca_kernels.dispatch._WINNERS`, before those of any GPU."""
    return f'    ("{kind}", "{gpu}", {most_keys}, Winner("{winner.choice}", "{winner.origin}")),'
