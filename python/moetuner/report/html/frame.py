"""The frame of a drawing: its area, scales, ticks and names.

A panel is as wide as a phone's screen; wider screens put two side by side.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

from moetuner.report.html.markup import Markup, join, tag

if TYPE_CHECKING:
    from collections.abc import Sequence

    from moetuner.report.html.markup import Child

WIDTH = 460.0
LEFT, RIGHT, TOP, BOTTOM = 66.0, 12.0, 10.0, 42.0
MAX_TICKS = 12


@dataclass(frozen=True, kw_only=True, slots=True)
class Frame:
    """A drawing area inside its margins; y grows downwards."""

    height: float
    left: float = LEFT
    top: float = TOP
    bottom: float = BOTTOM

    @property
    def width(self) -> float:
        """Width of the area."""
        return WIDTH - self.left - RIGHT

    @property
    def end(self) -> float:
        """Where the area ends below."""
        return self.top + self.height

    def draw(self, name: str, *children: Child, **attributes: Child) -> Markup:
        """The whole drawing; `name` is read out and shown by nothing else."""
        size = f"0 0 {WIDTH:g} {self.end + self.bottom:g}"
        attributes = {"viewBox": size, "role": "img", "aria_label": name, **attributes}
        return tag("svg", *children, **attributes)

    def names(self, x: str, y: str) -> Markup:
        """What the axes are, in words."""
        middle = self.top + self.height / 2
        return join(
            [
                tag(
                    "text",
                    x,
                    x=self.left + self.width / 2,
                    y=self.end + 36,
                    class_="name",
                    text_anchor="middle",
                ),
                tag(
                    "text",
                    y,
                    transform=f"translate(15 {middle:g}) rotate(-90)",
                    class_="name",
                    text_anchor="middle",
                ),
            ]
        )

    def x_label(self, x: float, text: str) -> Markup:
        """A number under the area."""
        return tag("text", text, x=x, y=self.end + 17, text_anchor="middle")

    def y_label(self, y: float, text: str) -> Markup:
        """A number left of the area."""
        return tag("text", text, x=self.left - 7, y=y + 4, text_anchor="end")


def every(count: int) -> range:
    """Indices that get a label, so that labels do not touch."""
    step = -(-count // MAX_TICKS)
    nice = next((n for n in (1, 2, 4, 5, 8, 10, 16, 20, 32) if n >= step), step)
    return range(0, count, nice)


def nice_ticks(
    low: float, high: float, count: int = 5, *, whole: bool = False
) -> list[float]:
    """About `count` round numbers from `low` to `high`; whole ones on demand."""
    if not high > low:
        return [low]
    rough = (high - low) / count
    unit = 10.0 ** math.floor(math.log10(rough))
    steps = (unit * m for m in (1, 2, 2.5, 5, 10) if unit * m >= rough * 0.999)
    step = next(s for s in (*steps, 1.0) if not whole or s == int(s))
    slack = 1e-9 * min(1.0, (high - low) / step)  # a whole step may be wider than all
    first = math.ceil(low / step - slack)
    last = math.floor(high / step + slack)
    return [i * step for i in range(first, last + 1)]


def short_number(value: float) -> str:
    """Few digits, for an axis."""
    if value == 0:
        return "0"
    if abs(value) < 1e-3 or abs(value) >= 1e5:
        return f"{value:.2g}"
    return f"{value:.4g}"


def key(entries: Sequence[tuple[str, str, str]]) -> Markup:
    """What the colours mean: (colour, dash of a line or "area", words)."""
    return tag(
        "p",
        *(
            tag("span", _swatch(color, dash), text, class_="entry")
            for color, dash, text in entries
        ),
        class_="key",
    )


def _swatch(color: str, dash: str) -> Markup:
    if dash == "area":
        mark = tag("rect", x=1.0, y=1.0, width=20.0, height=10.0, rx=2.0, fill=color)
    else:
        mark = tag(
            "line",
            x1=0,
            y1=6,
            x2=22,
            y2=6,
            stroke=color,
            stroke_width=2.5,
            stroke_dasharray=dash or None,
        )
    return tag(
        "svg", mark, viewBox="0 0 22 12", width=22, height=12, aria_hidden="true"
    )
