"""HTML and SVG elements from plain values: whatever is not markup already is escaped, so that nothing is by accident.

Knows nothing about reports.
"""

from collections.abc import Mapping
from html import escape

Attribute = str | int | float | bool | None
VOID = {"meta", "br", "hr", "rect", "line", "path", "circle", "polyline", "polygon"}


class Markup(str):
    """Text that is HTML already; made by `element` and `join` alone."""

    __slots__ = ()


def element(name: str, attributes: Mapping[str, Attribute] | None = None, *children: str) -> Markup:
    """`<name ...>children</name>`; children that are not Markup are text.

    An attribute that is None or False is left out, one that is True has no value.
    """
    inside = "".join(_attribute(key, value) for key, value in (attributes or {}).items())
    if name in VOID and not children:
        return Markup(f"<{name}{inside}/>")
    return Markup(f"<{name}{inside}>{join(*children)}</{name}>")


def join(*children: str) -> Markup:
    """Children one after the other, text escaped."""
    return Markup("".join(child if isinstance(child, Markup) else escape(child, quote=False) for child in children))


def number(value: float) -> str:
    """A coordinate, to a hundredth."""
    return f"{value:.2f}".rstrip("0").rstrip(".")


def _attribute(key: str, value: Attribute) -> str:
    if value is None or value is False:
        return ""
    if value is True:
        return f" {key}"
    text = number(value) if isinstance(value, float) else str(value)
    return f' {key}="{escape(text)}"'
