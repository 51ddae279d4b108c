"""What the site needs beyond its plugins: signatures of named tuples, and formulas without a script."""

import html
import re
from typing import Any

import griffe
from latex2mathml.converter import convert

_ROLE = re.compile(r":math:<code>(.*?)</code>")


def on_page_content(text: str, **_: Any) -> str:
    """Turn the role `:math:` of docstrings, as Sphinx has it, into MathML, which browsers show as it is."""
    return _ROLE.sub(lambda match: convert(html.unescape(match[1])), text)


class NamedTuples(griffe.Extension):
    """Gives the classes that derive from `NamedTuple` the constructor that Python gives them."""

    def on_class(self, *, cls: griffe.Class, **_: Any) -> None:
        """Make the fields of a class its parameters."""
        if "NamedTuple" not in map(str, cls.bases):
            return
        fields = [field for field in cls.attributes.values() if field.annotation is not None]
        kind = griffe.ParameterKind.positional_or_keyword
        parameters = [
            griffe.Parameter(field.name, annotation=field.annotation, kind=kind, default=field.value)
            for field in fields
        ]
        cls.set_member("__init__", griffe.Function("__init__", parameters=griffe.Parameters(*parameters)))
