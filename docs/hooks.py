"""Formulas of docstrings, as MathML: browsers show it without a script, and so without a network."""

import html
import re
from typing import Any

from latex2mathml.converter import convert

_ROLE = re.compile(r":math:<code>(.*?)</code>")


def on_page_content(text: str, **_: Any) -> str:
    """Replace the role `:math:` of docstrings, as Sphinx has it, on a rendered page."""
    return _ROLE.sub(lambda match: convert(html.unescape(match[1])), text)
