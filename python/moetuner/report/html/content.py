"""What sections are made of: figures, and the numbers behind them."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from moetuner.report.html.frame import key
from moetuner.report.html.markup import Markup, tag
from moetuner.report.html.palette import AFTER, BEFORE

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from moetuner.planning.scores import Comparison, Scored
    from moetuner.report.html.markup import Child

MAX_NUMBERS = 150_000
"""Numbers of one table; a page with more would be slow on a phone."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Pair:
    """The two placements that every figure compares."""

    before: Scored
    after: Scored

    @classmethod
    def of(cls, comparison: Comparison) -> Pair:
        """Baseline and result."""
        return cls(before=comparison.baseline, after=comparison.result)

    @property
    def differ(self) -> bool:
        """Whether there are two of them."""
        return self.before is not self.after

    def both(self) -> tuple[Scored, ...]:
        """Before, then after; one when they are the same."""
        return (self.before, self.after) if self.differ else (self.after,)

    def colors(self) -> tuple[str, ...]:
        """A colour for each of `both`."""
        return (BEFORE.css, AFTER.css) if self.differ else (AFTER.css,)

    def dashes(self) -> tuple[str, ...]:
        """A dash pattern for each of `both`: grey prints tell them apart."""
        return ("6 4", "") if self.differ else ("",)

    def key(self) -> Markup:
        """Which line is which."""
        entries = zip(self.colors(), self.dashes(), self.both(), strict=True)
        return key([(color, dash, one.name) for color, dash, one in entries])


@dataclass(kw_only=True, slots=True)
class Numbers:
    """Tables of numbers of a page, by name."""

    tables: dict[str, str] = field(default_factory=dict)

    def table(
        self,
        name: str,
        title: str,
        head: Sequence[str],
        rows: Iterable[Sequence[Child]],
    ) -> Markup:
        """A folded table of comma-separated values that programs can read as well."""
        lines = [",".join(_cell(cell) for cell in row) for row in (head, *rows)]
        if len(lines) * len(head) > MAX_NUMBERS:
            words = f"{title}: {len(lines) * len(head):,} numbers, too many for a page."
            return tag("p", words, class_="note")
        self.tables[name] = "\n".join(lines)
        return tag(
            "details",
            tag("summary", f"{title} ({len(lines) - 1:,} rows of CSV)"),
            tag("pre", self.tables[name], id=f"csv-{name}", tabindex="0"),
            class_="numbers",
        )


def _cell(value: Child) -> str:
    """A CSV cell (RFC 4180); numbers with six digits, unknown ones empty."""
    if value is None or value != value:
        return ""
    if isinstance(value, float):
        return f"{value:.6g}"
    text = str(value)
    if text[:1] in "=+-@\t\r" and isinstance(value, str):
        text = f"'{text}"  # spreadsheets would run it
    if any(mark in text for mark in ',"\n\r'):
        return '"' + text.replace('"', '""') + '"'
    return text


def section(name: str, title: str, lead: Child, *content: Child) -> Markup:
    """A part of the page; `name` is where links lead."""
    return tag(
        "section", tag("h2", title), tag("p", lead, class_="lead"), *content, id=name
    )


def figure(title: Child, drawing: Child, *notes: Child, color: str = "") -> Markup:
    """A drawing under its title."""
    mark = f"border-color:{color}" if color else None
    return tag("figure", tag("figcaption", title, style=mark), drawing, *notes)


def grid(*figures: Child) -> Markup:
    """Figures side by side where there is room."""
    return tag("div", *figures, class_="grid")


def note(*text: Child) -> Markup:
    """Small print."""
    return tag("p", *text, class_="note")
