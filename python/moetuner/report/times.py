"""Measured times beside predicted ones, as a table and in a sentence."""

from __future__ import annotations

from typing import TYPE_CHECKING

from moetuner.evaluation.times_file import LayerPart
from moetuner.report.table import plain_table

if TYPE_CHECKING:
    from collections.abc import Sequence

    from rich.table import Table

    from moetuner.evaluation.step_times import PartTimes


def times_table(found: Sequence[PartTimes], within: float) -> Table:
    """One row for each part, or for each part of each layer."""
    table = plain_table("Times of a mean step (ms)")
    table.add_column("part")
    table.add_column("layer", justify="right")
    for head in ("predicted", "measured", "measured /\npredicted"):
        table.add_column(head, justify="right", no_wrap=True)
    table.add_column("")
    for one in found:
        table.add_row(
            one.part.value,
            "all" if one.layer is None else str(one.layer),
            f"{one.predicted * 1e3:.4g}",
            f"{one.measured * 1e3:.4g}",
            f"{one.ratio:.2f}",
            "" if one.error <= within else "off",
        )
    return table


def times_verdict(found: Sequence[PartTimes], within: float) -> str:
    """Which part is off, and by how many milliseconds it moves the whole."""
    off = [one for one in found if one.error > within]
    if not off:
        return f"every time is within {within:.0%} of the prediction"
    parts = [one for one in off if one.part is not LayerPart.TOTAL] or off
    worst = max(parts, key=lambda one: abs(one.measured - one.predicted))
    where = "" if worst.layer is None else f" of layer {worst.layer}"
    more = worst.measured > worst.predicted
    return (
        f"{len(off)} of {len(found)} times are not within {within:.0%} of the "
        f"prediction; most is in {worst.part.value}{where}: "
        f"{abs(worst.measured - worst.predicted) * 1e3:.4g} ms "
        f"{'more' if more else 'less'} than predicted"
    )
