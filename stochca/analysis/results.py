"""What an analysis of a run consists of."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from stochca.analysis.comparison import Comparison
from stochca.analysis.measures import MEASURES, Measure


@dataclass(frozen=True)
class Pictures:
    """Some images, and where both models look in them in the last block.

    Args:
        pixels: uint8 `[n, H, W, 3]`.
        target: Maps `[n, rows, columns]`, each of sum 1.
        source: The same of the source.
    """

    pixels: np.ndarray
    target: np.ndarray
    source: np.ndarray


@dataclass(frozen=True)
class Analysis:
    """Of one run.

    Args:
        name: Of the run.
        comparison: Of its target with its source.
        facts: Where its weights come from, by name.
        config: The options that it was trained with, as far as they are known.
        pictures: None where none were asked for.
    """

    name: str
    comparison: Comparison
    facts: dict[str, str]
    config: dict[str, Any]
    pictures: Pictures | None = None


def measures_of(analyses: Sequence[Analysis]) -> Iterator[Measure]:
    """What was measured of at least one run, in the order of the definitions."""
    for name, measure in MEASURES.items():
        if any(name in analysis.comparison.measured for analysis in analyses):
            yield measure
