"""How incumbent and bound came together while the solver ran."""

from __future__ import annotations

from typing import TYPE_CHECKING

from moetuner.report.html.charts import Line, line_chart
from moetuner.report.html.content import figure, grid, section
from moetuner.report.html.frame import key
from moetuner.report.html.palette import AFTER, BEFORE
from moetuner.report.words import gap, solved

if TYPE_CHECKING:
    from moetuner.placement.model import ProgressPoint, Provenance
    from moetuner.planning.scores import Comparison
    from moetuner.report.html.content import Numbers
    from moetuner.report.html.markup import Markup

_LARGE = 1e100
_PARTS = (
    ("bound", BEFORE.css, "6 4", "lower bound"),
    ("incumbent", AFTER.css, "", "best found"),
)


def convergence(comparison: Comparison, numbers: Numbers) -> Markup:
    """A chart per stage of the solver."""
    origin = comparison.result.placement.provenance
    stages: dict[str, list[ProgressPoint]] = {}
    for point in origin.progress:
        stages.setdefault(point.stage, []).append(point)
    if not stages:
        return section(
            "convergence", "Convergence", f"{_claim(origin)} {_silent(origin)}"
        )
    table = numbers.table(
        "convergence",
        "Incumbent and bound over time",
        ("stage", "seconds", "incumbent", "bound"),
        ((p.stage, p.seconds, p.incumbent, p.bound) for p in origin.progress),
    )
    charts = [_chart(name, points) for name, points in stages.items()]
    return section(
        "convergence",
        "Convergence",
        _claim(origin),
        key(
            [
                (color, dash, words)
                for part, color, dash, words in _PARTS
                if any(getattr(point, part) is not None for point in origin.progress)
            ]
        ),
        grid(*(chart for chart in charts if chart is not None)),
        table,
    )


def _chart(name: str, points: list[ProgressPoint]) -> Markup | None:
    lines = []
    for part, color, dash, _ in _PARTS:
        known = [(_drawn(p.seconds), getattr(p, part)) for p in points]
        kept = [(at, _drawn(value)) for at, value in known if value is not None]
        if not kept:
            continue
        end = max(_drawn(points[-1].seconds), kept[-1][0])
        at, values = [x for x, _ in kept], [y for _, y in kept]
        lines.append(
            Line(
                x=[*at, end], y=[*values, values[-1]], color=color, dash=dash, name=part
            )
        )
    if not lines:
        return None
    drawing = line_chart(
        lines,
        x="seconds",
        y="objective of the stage",
        steps=True,
        name=f"{name}: incumbent and bound over time",
    )
    return figure(f"{name}: {_state(points[-1])}", drawing)


def _drawn(value: float) -> float:
    """A file may say anything; differences of what is drawn must be numbers."""
    return min(max(float(value), -_LARGE), _LARGE)


def _state(point: ProgressPoint) -> str:
    if point.incumbent is None:
        return f"bound {solved(point.bound)}, nothing found"
    if point.bound is None:
        return f"{solved(point.incumbent)}, no bound"
    far = gap(point.incumbent, point.bound)
    return f"{solved(point.incumbent)}, bound {solved(point.bound)}, gap {far}"


def _claim(origin: Provenance) -> str:
    if not origin.solver:
        return "Which solver made this placement is unknown."
    text = f"Solver {origin.solver}"
    if origin.objective:
        text += f" minimised {origin.objective}"
    if origin.value is not None:
        text += f" to {solved(origin.value)} on the planning part"
    if origin.lower_bound is not None:
        text += f", proven to be at least {solved(origin.lower_bound)}"
        if origin.value is not None:
            text += f" (gap {gap(origin.value, origin.lower_bound)})"
    if origin.seconds is not None:
        text += f", in {origin.seconds:.3g} s"
    return f"{text} ({origin.status or 'status unknown'})."


def _silent(origin: Provenance) -> str:
    return "The placement records no course of its solve; " + (
        "this solver tells none."
        if origin.solver in ("lpt", "chain", "contiguous", "random")
        else "plan again to have one."
    )
