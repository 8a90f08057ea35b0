"""Tables of numbers as coloured cells."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from moetuner.report.html.colors import STEPS, Scale
from moetuner.report.html.frame import Frame, every
from moetuner.report.html.markup import Markup, tag
from moetuner.report.html.png import png_uri

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

    Floats = NDArray[np.float64]

_MAX_WRITTEN = 8
"""More columns than this leave no room for numbers in the cells."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Axis:
    """Name of an axis, the label of each cell, and cells that a line stands before."""

    name: str
    labels: Sequence[str]
    lines: Sequence[int] = ()
    show: bool = True


def heatmap(
    values: Floats,
    scale: Scale,
    *,
    x: Axis,
    y: Axis,
    name: str,
    height: float | None = None,
    lookup: str | None = None,
) -> Markup:
    """Draw `values` [rows, columns].

    Parameters
    ----------
    height
        Of the area; by default cells are square.
    lookup
        ``table column-stride row-stride offset column`` of each cell's number in the
        page's tables, for who points at a cell.
    """
    rows, columns = values.shape
    frame = Frame(height=0)
    frame = Frame(height=height or frame.width * rows / columns)
    dx, dy = frame.width / columns, frame.height / rows
    parts = [
        *(
            tag(
                "image",
                href=uri,
                x=frame.left,
                y=frame.top,
                width=frame.width,
                height=frame.height,
                preserveAspectRatio="none",
                class_=when,
            )
            for when, uri in _pictures(scale.index(values), scale)
        ),
        *_lines(frame, x.lines, y.lines, dx, dy),
    ]
    if columns <= _MAX_WRITTEN and dy >= 14:
        parts += _written(values, scale, frame, dx, dy)
    if x.show:
        parts += [
            frame.x_label(frame.left + (i + 0.5) * dx, x.labels[i])
            for i in every(columns)
        ]
    if y.show:
        parts += [
            frame.y_label(frame.top + (i + 0.5) * dy, y.labels[i]) for i in every(rows)
        ]
    area = f"{frame.left} {frame.top} {frame.width} {frame.height} {rows} {columns}"
    return frame.draw(
        name,
        *parts,
        frame.names(x.name, y.name),
        data_area=area if lookup else None,
        data_lookup=lookup,
    )


def color_bar(scale: Scale, *tables: Floats, end: str = "", words: str = "") -> Markup:
    """What the colours of the tables' values mean; `end` follows the largest."""
    values = np.concatenate([table[np.isfinite(table)].ravel() for table in tables])
    low, high = (float(values.min()), float(values.max())) if values.size else (0, 0)
    low, high = max(low, scale.low), min(high, scale.high)
    steps = scale.index(np.linspace(low, high, STEPS))[None]
    pictures = [
        tag("img", src=uri, alt="", class_=f"bar {when}")
        for when, uri in _pictures(steps, scale)
    ]
    return tag(
        "p",
        tag("span", f"{scale.label}:", class_="entry"),
        tag("span", f"{low:.3g}", *pictures, f"{high:.3g}{end}", class_="entry"),
        tag("span", words, class_="entry") if words else None,
        class_="key",
    )


def _pictures(pixels: NDArray[np.uint8], scale: Scale) -> list[tuple[str, str]]:
    """The same pixels by day and by night; the style sheet shows one of them."""
    ramps = (("day", scale.ramp.day), ("night", scale.ramp.night))
    return [(when, png_uri(pixels, ramp)) for when, ramp in ramps]


def _lines(
    frame: Frame, columns: Sequence[int], rows: Sequence[int], dx: float, dy: float
) -> list[Markup]:
    """Lines between groups of cells, in one path."""
    across = [f"M{frame.left:g} {frame.top + i * dy:.2f}h{frame.width:g}" for i in rows]
    down = [
        f"M{frame.left + i * dx:.2f} {frame.top:g}v{frame.height:g}" for i in columns
    ]
    return [tag("path", d="".join(across + down), class_="rule")]


def _written(
    values: Floats, scale: Scale, frame: Frame, dx: float, dy: float
) -> list[Markup]:
    known = values[np.isfinite(values)]
    form = ".0f" if (known == np.round(known)).all() else ".2f"
    return [
        tag(
            "text",
            format(value, form),
            x=frame.left + (column + 0.5) * dx,
            y=frame.top + (row + 0.5) * dy + 4,
            class_=_cell(scale, value),
        )
        for (row, column), value in np.ndenumerate(values)
        if np.isfinite(value)
    ]


def _cell(scale: Scale, value: float) -> str:
    """Which writing is easiest to read on the value's colour, by day and by night."""
    light = " light" if scale.wants_white(value) else ""
    return "cell" + light + ("" if scale.wants_white(value, night=True) else " bright")
