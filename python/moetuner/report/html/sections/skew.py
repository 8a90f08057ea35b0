"""What of the load's unevenness any static placement can remove."""

from __future__ import annotations

from typing import TYPE_CHECKING

from moetuner._words import amount
from moetuner.planning.skew import measure_skew
from moetuner.report.html.charts import Line, line_chart
from moetuner.report.html.content import figure, grid, note
from moetuner.report.html.frame import key
from moetuner.report.html.markup import Markup, tag
from moetuner.report.html.palette import AFTER, BEFORE, OTHER
from moetuner.report.skew import skew_words

if TYPE_CHECKING:
    from moetuner.planning.scores import Comparison
    from moetuner.report.html.content import Numbers

_PARTS = {
    "contiguous blocks": (BEFORE.css, "6 4"),
    "best static balance": (AFTER.css, ""),
    "by chance alone": (OTHER.css, "2 3"),
}


def skew(comparison: Comparison, numbers: Numbers) -> Markup:
    """All tokens at once beside the mean batch, by layer."""
    found = measure_skew(
        comparison.scored,
        comparison.topology.num_ranks,
        batch_tokens=comparison.result.evaluation.batch_tokens,
        batch_kind=comparison.batch_kind,
    )
    layers = [float(layer) for layer in comparison.statistics.layer_ids]
    sides = {
        "All tokens at once": (found.persistent, found.left, found.persistent_chance),
        f"Mean of {amount(found.num_batches, 'batch')}": (
            found.blocks,
            found.transient,
            found.transient_chance,
        ),
    }
    charts = [
        figure(
            title,
            line_chart(
                [
                    Line(x=layers, y=y.tolist(), color=color, dash=dash, name=name)
                    for y, (name, (color, dash)) in zip(
                        values, _PARTS.items(), strict=True
                    )
                ],
                x="layer",
                y="fullest / mean",
                floor=1.0,
                name=f"{title}: fullest rank over mean rank, by layer",
            ),
            key([(color, dash, name) for name, (color, dash) in _PARTS.items()]),
        )
        for title, values in sides.items()
    ]
    columns = [values for side in sides.values() for values in side]
    table = numbers.table(
        "skew",
        "Fullest rank over the mean rank: all tokens, and the mean batch",
        (
            "layer",
            *(f"{name}, all tokens" for name in _PARTS),
            *(f"{name}, mean batch" for name in _PARTS),
        ),
        (
            (str(layer), *(float(values[i]) for values in columns))
            for i, layer in enumerate(comparison.statistics.layer_ids)
        ),
    )
    return tag(
        "div",
        tag("h3", "What stays uneven, and what changes with the batch"),
        note(skew_words(found)),
        grid(*charts),
        table,
    )
