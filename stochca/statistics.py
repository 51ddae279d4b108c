"""Means over seeds with their spreads, and how they are written."""

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

Spread = Literal["standard deviation", "standard error"]

# What stands where there is no number.
NOTHING = "-"

DEFINITIONS: dict[Spread, str] = {
    "standard deviation": "sample standard deviation (n - 1)",
    "standard error": "standard error of the mean (sample standard deviation over the root of n)",
}


@dataclass(frozen=True)
class Estimate:
    """A mean over seeds.

    Args:
        values: One per seed.
        kind: Of the spread.
    """

    values: Sequence[float]
    kind: Spread

    @property
    def n(self) -> int:
        """How many seeds."""
        return len(self.values)

    @property
    def mean(self) -> float | None:
        """None without a seed."""
        return statistics.mean(self.values) if self.values else None

    @property
    def spread(self) -> float | None:
        """Sample standard deviation (n - 1), or it over the root of n; None for less than two seeds."""
        if self.n < 2:
            return None
        deviation = statistics.stdev(self.values)
        return deviation if self.kind == "standard deviation" else deviation / math.sqrt(self.n)


def number(value: float | None, digits: str) -> str:
    """A number in a format, as ".2f"."""
    return NOTHING if value is None else format(value, digits)


def with_spread(estimate: Estimate, digits: str) -> str:
    """A mean in a format, and its spread."""
    if estimate.mean is None:
        return NOTHING
    return f"{estimate.mean:{digits}} ± {number(estimate.spread, '.2f')}"


def markdown_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Cells as a table, the first column by words, the others by numbers."""
    lines = [header, ["---", *["---:"] * (len(header) - 1)], *rows]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)
