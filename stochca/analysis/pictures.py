"""The images of a report, each as a data URI with words for those who do not see it."""

import base64
import io
from collections.abc import Sequence
from typing import NamedTuple

import matplotlib as mpl
import numpy as np
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from PIL import Image

from stochca.analysis.plots import Panel, drawn
from stochca.analysis.results import Analysis
from stochca.analysis.style import RC, series, themed

# Pixels of the longer side of an image.
SIZE = 224

# Share of the colours of attention over the image, which is grey below.
OPACITY = 0.65


class Picture(NamedTuple):
    """An image of the report.

    Args:
        src: Its data, as a URI.
        alt: What it shows, in words.
        label: Below it.
    """

    src: str
    alt: str
    label: str = ""


def plots(panels: Sequence[Panel]) -> list[Picture]:
    """Panels as SVG, in colours that follow the reader's preference for light or dark."""
    return [Picture(_svg(drawn(panel)), panel.text) for panel in panels]


def swatch(index: int) -> Picture:
    """The line of a run as the plots have it, for a legend."""
    figure = Figure(figsize=(0.42, 0.16))
    line = Line2D([0.05, 0.5, 0.95], [0.5] * 3, linewidth=1.8, markersize=5, markevery=[1], **series(index))
    figure.add_artist(line)
    return Picture(_svg(figure), "")


def looks(analyses: Sequence[Analysis]) -> list[list[Picture]]:
    """For each image: itself, where the source looks, and where the target of each run does.

    The source is shown once where all runs have the same. Colours of one row are on one scale.
    """
    runs = [(analysis.name, analysis.pictures) for analysis in analyses if analysis.pictures is not None]
    rows = []
    for i in range(min((len(pictures.pixels) for _, pictures in runs), default=0)):
        first = runs[0][1]
        is_shared = all(np.array_equal(pictures.source[i], first.source[i]) for _, pictures in runs)
        maps = []
        for name, pictures in runs:
            if pictures is first or not is_shared:
                whose = "source" if is_shared else f"source of {name}"
                maps.append((whose, pictures.pixels[i], pictures.source[i]))
            maps.append((name, pictures.pixels[i], pictures.target[i]))
        highest = max(values.max() for _, _, values in maps)
        image = Picture(_jpeg(Image.fromarray(first.pixels[i])), f"Image {i + 1}", "image")
        rows.append([image, *(_look(*shown, highest) for shown in maps)])
    return rows


def _look(whose: str, pixels: np.ndarray, values: np.ndarray, highest: float) -> Picture:
    """Attention `[rows, columns]` over an image."""
    grey = Image.fromarray(pixels).convert("L").convert("RGB")
    colours = (mpl.colormaps["inferno"](values / highest)[..., :3] * 255).round().astype(np.uint8)
    over = Image.fromarray(colours).resize(grey.size, Image.Resampling.NEAREST)
    row, column = np.unravel_index(values.argmax(), values.shape)
    alt = f"Attention of {whose}: highest, {values.max():.1%}, in row {row}, column {column} of the patches"
    return Picture(_jpeg(Image.blend(grey, over, OPACITY)), alt, whose)


def _svg(figure: Figure) -> str:
    buffer = io.StringIO()
    with mpl.rc_context(RC):
        figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None})
    return _uri("svg+xml", themed(buffer.getvalue()).encode())


def _jpeg(image: Image.Image) -> str:
    factor = SIZE / max(image.size)
    buffer = io.BytesIO()
    image.resize([round(side * factor) for side in image.size], Image.Resampling.BICUBIC).save(
        buffer, format="JPEG", quality=88
    )
    return _uri("jpeg", buffer.getvalue())


def _uri(kind: str, data: bytes) -> str:
    return f"data:image/{kind};base64,{base64.b64encode(data).decode()}"
