"""Shapes of an SVG that is readable on light and on dark pages."""

from collections.abc import Sequence
from html import escape
from textwrap import wrap

STYLE = """\
text { font: 14px Helvetica, Arial, sans-serif; fill: #222 }
.small { font-size: 12px }
.bold { font-weight: bold }
.middle { text-anchor: middle }
.end { text-anchor: end }
.page { fill: #fff }
.cell { fill: #f6f7f9; stroke: #9aa3ad }
.target { fill: #d6e6f7; stroke: #2f6fb0 }
.source { fill: #fff3d6; stroke: #b97a00 }
.not { fill: none; stroke: #b8bec5; stroke-dasharray: 4 3 }
.padding { fill: url(#padding); stroke: none }
.hatch { stroke: #9aa3ad }
.line { fill: none; stroke: #444; stroke-width: 1.6 }
.read { fill: none; stroke: #b97a00; stroke-width: 2 }
.head { fill: #444 }
@media (prefers-color-scheme: dark) {
  text { fill: #e4e6ea }
  .page { fill: #1e2129 }
  .cell { fill: #2a2e38; stroke: #6d7683 }
  .target { fill: #1d3a57; stroke: #6aa7e0 }
  .source { fill: #4a3a12; stroke: #d9a033 }
  .not { stroke: #565e6a }
  .hatch { stroke: #6d7683 }
  .line { stroke: #c5c9d0 }
  .read { stroke: #d9a033 }
  .head { fill: #c5c9d0 }
}"""

DEFINITIONS = """\
<pattern id="padding" width="6" height="6" patternUnits="userSpaceOnUse" patternTransform="rotate(45)">\
<path class="hatch" d="M0 0V6"/></pattern>
<marker id="head" viewBox="0 0 10 10" refX="9" refY="5" markerWidth="7" markerHeight="7" orient="auto">\
<path class="head" d="M0 0L10 5L0 10z"/></marker>"""

LINE_HEIGHT = 18


class Drawing:
    """Shapes, one after another, each with the classes of its look.

    Args:
        width: In pixels.
        height: In pixels.
        title: What the drawing shows, for those who cannot see it.
    """

    def __init__(self, width: int, height: int, title: str) -> None:
        self.width, self.height, self.title = width, height, title
        self._shapes: list[str] = []

    def rectangle(self, x: float, y: float, width: float, height: float, look: str) -> None:
        """A rectangle from its upper left corner."""
        self._shapes.append(
            f'<rect class="{look}" x="{x:g}" y="{y:g}" width="{width:g}" height="{height:g}"/>'
        )

    def text(self, x: float, y: float, text: str, look: str = "") -> None:
        """A line of text on its base line."""
        self._shapes.append(f'<text class="{look}" x="{x:g}" y="{y:g}">{escape(text)}</text>')

    def paragraph(self, x: float, y: float, text: str, characters: int, look: str = "") -> float:
        """Lines of at most so many characters; returns the base line that would follow them."""
        for line in wrap(text, characters):
            self.text(x, y, line, look)
            y += LINE_HEIGHT
        return y

    def arrow(self, points: Sequence[tuple[float, float]], look: str = "line") -> None:
        """A line through points, with a head at its end."""
        path = "L".join(f"{x:g} {y:g}" for x, y in points)
        self._shapes.append(f'<path class="{look}" d="M{path}" marker-end="url(#head)"/>')

    def __str__(self) -> str:
        return "\n".join(
            [
                f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {self.width} {self.height}">',
                f"<title>{escape(self.title)}</title>",
                f"<style>\n{STYLE}\n</style>",
                f"<defs>\n{DEFINITIONS}\n</defs>",
                f'<rect class="page" width="{self.width}" height="{self.height}" rx="8"/>',
                *self._shapes,
                "</svg>\n",
            ]
        )
