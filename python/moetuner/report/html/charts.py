"""Lines, bars and intervals."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

from moetuner.report.html.frame import Frame, every, nice_ticks, short_number
from moetuner.report.html.markup import Markup, tag
from moetuner.report.html.palette import AFTER, OTHER
from moetuner.report.words import gain_cell, number

if TYPE_CHECKING:
    from collections.abc import Sequence

    from moetuner.evaluation.evaluate import GainInterval

_ROOM = 104.0
"""For names left of bars."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Line:
    """One line: its points, colour, dash pattern and name."""

    x: Sequence[float]
    y: Sequence[float]
    color: str
    dash: str = ""
    name: str = ""


@dataclass(frozen=True, kw_only=True, slots=True)
class Part:
    """One part of every bar."""

    values: Sequence[float]
    color: str
    name: str


def line_chart(
    lines: Sequence[Line],
    *,
    x: str,
    y: str,
    name: str,
    steps: bool = False,
    floor: float | None = None,
    height: float = 190.0,
) -> Markup:
    """Draw lines over a common scale.

    Parameters
    ----------
    steps
        A value holds until the next one, and x is a time instead of a number of a
        layer or rank.
    floor
        A value that the scale shows in any case.
    """
    frame = Frame(height=height)
    xs = [value for line in lines for value in line.x]
    ys = [value for line in lines for value in line.y]
    low, high = _span(ys if floor is None else [*ys, floor])
    left, right = (0.0 if steps else min(xs)), max(xs)
    across = frame.width / ((right - left) or 1)
    up = frame.height / (high - low)

    def at(point: tuple[float, float]) -> tuple[float, float]:
        return (
            frame.left + (point[0] - left) * across,
            frame.end - (point[1] - low) * up,
        )

    unit, y = _unit(y, max(abs(low), abs(high)))
    parts = _grid(frame, nice_ticks(low, high), low, up, unit)
    for tick in nice_ticks(left, right, 6, whole=not steps):
        parts.append(frame.x_label(at((tick, 0))[0], short_number(tick)))
    for line in lines:
        points = [at(point) for point in zip(line.x, line.y, strict=True)]
        parts.append(
            tag(
                "path",
                tag("title", line.name),
                d=_path(points, steps),
                class_="line",
                stroke=line.color,
                stroke_dasharray=line.dash or None,
            )
        )
        if len(set(points)) == 1:  # a path of no length is not drawn
            cx, cy = points[0]
            parts.append(tag("circle", cx=cx, cy=cy, r=4.0, fill=line.color))
    return frame.draw(name, *parts, frame.names(x, y))


def _path(points: Sequence[tuple[float, float]], steps: bool) -> str:
    if steps:
        (x, y), *others = points
        return f"M{x:.1f} {y:.1f}" + "".join(f"H{x:.1f}V{y:.1f}" for x, y in others)
    return "M" + "L".join(f"{x:.1f} {y:.1f}" for x, y in points)


def _span(values: Sequence[float]) -> tuple[float, float]:
    """A range around the values, with a little air."""
    low, high = min(values), max(values)
    air = 0.06 * (high - low) or 0.05 * abs(high) or 0.5
    return (low if low == 0 else low - air), high + air


def _unit(name: str, largest: float) -> tuple[float, str]:
    """A power of a thousand that keeps labels short, and the axis named with it."""
    if largest == 0 or 0.1 <= largest < 1e5:
        return 1.0, name
    power = 3 * math.floor(math.log10(largest) / 3)
    return 10.0**power, f"{name}, 1e{power}"


def _grid(
    frame: Frame, ticks: Sequence[float], low: float, up: float, unit: float = 1.0
) -> list[Markup]:
    parts = []
    for tick in ticks:
        y = frame.end - (tick - low) * up
        parts.append(
            tag("path", d=f"M{frame.left:g} {y:.1f}h{frame.width:g}", class_="grid")
        )
        parts.append(frame.y_label(y, short_number(tick / unit)))
    return parts


def column_chart(
    parts: Sequence[Part], labels: Sequence[str], *, x: str, y: str, name: str
) -> Markup:
    """Draw stacked columns, one per label."""
    frame = Frame(height=190.0)
    totals = [sum(column) for column in zip(*(p.values for p in parts), strict=True)]
    high = max(totals) * 1.05 or 1.0
    up, step = frame.height / high, frame.width / len(totals)
    drawn = _grid(frame, nice_ticks(0, high), 0, up)
    width = step * (0.72 if step > 5 else 0.96)
    base = [0.0] * len(totals)
    for part in parts:
        outline = ""
        for i, value in enumerate(part.values):
            if value > 0:
                left = frame.left + i * step + (step - width) / 2
                top = frame.end - (base[i] + value) * up
                outline += (
                    f"M{left:.1f} {top:.1f}h{width:.1f}v{value * up:.1f}h-{width:.1f}z"
                )
            base[i] += value
        drawn.append(tag("path", tag("title", part.name), d=outline, fill=part.color))
    for i in every(len(labels)):
        drawn.append(frame.x_label(frame.left + (i + 0.5) * step, labels[i]))
    return frame.draw(name, *drawn, frame.names(x, y))


def bar_chart(
    parts: Sequence[Part], labels: Sequence[str], *, x: str, name: str
) -> Markup:
    """Draw stacked bars that lie, one per label, with their sums behind them."""
    row = 30.0
    frame = Frame(height=row * len(labels), left=_ROOM, bottom=28.0)
    totals = [sum(bar) for bar in zip(*(p.values for p in parts), strict=True)]
    across = (frame.width - 56) / (max(totals) or 1)
    drawn = []
    for i, (label, total) in enumerate(zip(labels, totals, strict=True)):
        y, at = frame.top + i * row, frame.left
        drawn.append(_row_name(frame, y + row / 2, label))
        for part in parts:
            width = part.values[i] * across
            drawn.append(
                tag(
                    "rect",
                    tag("title", f"{part.name}: {part.values[i]:.4g}"),
                    x=at,
                    y=y + 5,
                    width=width,
                    height=row - 10,
                    fill=part.color,
                )
            )
            at += width
        drawn.append(tag("text", number(total), x=at + 6, y=y + row / 2 + 4))
    name_x = tag("text", x, x=frame.left, y=frame.end + 20, class_="name")
    return frame.draw(name, *drawn, name_x)


def gain_chart(
    gains: Sequence[tuple[str, GainInterval]], *, x: str, name: str
) -> Markup:
    """Draw gains with their intervals beside the line of no gain."""
    row = 30.0
    frame = Frame(height=row * len(gains), left=_ROOM)
    edges = [0.0, *(edge for _, gain in gains for edge in (gain.low, gain.high))]
    low, high = _span([min(edges) - 1e-4, max(edges) + 1e-4])
    across = frame.width / (high - low)

    def at(value: float) -> float:
        return frame.left + (value - low) * across

    drawn = []
    for tick in nice_ticks(low, high):
        line = f"M{at(tick):.1f} {frame.top:g}v{frame.height:g}"
        drawn.append(tag("path", d=line, class_="grid"))
        drawn.append(frame.x_label(at(tick), f"{tick * 100:+.3g}%" if tick else "0"))
    zero = f"M{at(0):.1f} {frame.top:g}v{frame.height:g}"
    drawn.append(tag("path", d=zero, class_="zero"))
    for i, (label, gain) in enumerate(gains):
        y = frame.top + (i + 0.5) * row
        color = (AFTER if gain.certain and gain.gain > 0 else OTHER).css
        words = f"{label}: {gain_cell(gain)}"
        drawn.append(_row_name(frame, y, label))
        whisker = f"M{at(gain.low):.1f} {y:g}H{at(gain.high):.1f}"
        drawn.append(tag("path", d=whisker, stroke=color, class_="whisker"))
        drawn.append(
            tag(
                "circle", tag("title", words), cx=at(gain.gain), cy=y, r=5.0, fill=color
            )
        )
    return frame.draw(name, *drawn, frame.names(x, ""))


def _row_name(frame: Frame, y: float, label: str) -> Markup:
    shown = label if len(label) <= 14 else f"{label[:13]}…"
    return tag(
        "text",
        tag("title", label),
        shown,
        x=frame.left - 8,
        y=y + 4,
        text_anchor="end",
        class_="row",
    )
