"""Markup that what it shows cannot break: every text and attribute is escaped."""

from __future__ import annotations

import html
from typing import TYPE_CHECKING, TypeAlias

if TYPE_CHECKING:
    from collections.abc import Iterable


class Markup(str):
    """Text that is markup already, and is not escaped again."""

    __slots__ = ()


Child: TypeAlias = "str | int | float | None"
_EMPTY = frozenset({"meta", "img", "image", "circle", "line", "path", "rect"})


def tag(name: str, /, *children: Child, **attributes: Child) -> Markup:
    """One element; a child of None is left out, and so is an attribute of None.

    ``class_`` is the attribute ``class``; other underscores stand for hyphens.

    Examples
    --------
    >>> print(tag("a", "<b>", class_="x", stroke_width=1.5))
    <a class="x" stroke-width="1.5">&lt;b&gt;</a>
    """
    given = "".join(
        f' {key.rstrip("_").replace("_", "-")}="{html.escape(_text(value))}"'
        for key, value in attributes.items()
        if value is not None
    )
    if name in _EMPTY and not children:
        return Markup(f"<{name}{given}/>")
    return Markup(f"<{name}{given}>{join(children)}</{name}>")


def join(children: Iterable[Child]) -> Markup:
    """Children one after the other, escaped where they are not markup."""
    return Markup(
        "".join(
            child if isinstance(child, Markup) else html.escape(_text(child))
            for child in children
            if child is not None
        )
    )


def _text(value: Child) -> str:
    """Numbers in drawing units: two decimals are finer than a pixel."""
    if isinstance(value, float):
        return f"{value:.2f}".rstrip("0").rstrip(".")
    return str(value)
