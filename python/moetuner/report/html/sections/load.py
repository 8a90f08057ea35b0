"""Load per rank and layer, before and after."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from moetuner.report.html.charts import Line, line_chart
from moetuner.report.html.colors import scale_around
from moetuner.report.html.content import Pair, figure, grid, section
from moetuner.report.html.heatmap import Axis, color_bar, heatmap
from moetuner.report.html.markup import tag
from moetuner.report.html.pooling import node_lines, pooled, rank_labels
from moetuner.report.html.sections.skew import skew
from moetuner.report.quantities import relative_load
from moetuner.report.words import number

if TYPE_CHECKING:
    from moetuner.planning.scores import Comparison
    from moetuner.report.html.content import Numbers
    from moetuner.report.html.markup import Markup

_HEIGHT = 220.0


def load(comparison: Comparison, numbers: Numbers) -> Markup:
    """Heat maps on one scale, and the busiest rank of each layer."""
    pair = Pair.of(comparison)
    topology = comparison.topology
    layers = [str(layer) for layer in comparison.statistics.layer_ids]
    ranks = rank_labels(topology.num_ranks)
    loads = [pooled(relative_load(c.evaluation), 1) for c in pair.both()]
    scale = scale_around(1.0, *loads, label="load / mean load")
    low = min(float(table.min()) for table in loads)
    high = max(float(table.max()) for table in loads)
    table = numbers.table(
        "load",
        "Load of each rank over the layer's mean",
        ("layer", "rank", *(c.name for c in pair.both())),
        (
            (layer, rank, *(float(table[i, g]) for table in loads))
            for i, layer in enumerate(layers)
            for g, rank in enumerate(ranks)
        ),
    )
    maps = [
        figure(
            c.name,
            heatmap(
                load.T,
                scale,
                x=Axis(name="layer", labels=layers),
                y=Axis(
                    name="rank",
                    labels=ranks,
                    lines=node_lines(topology.num_ranks, topology.ranks_per_node),
                ),
                height=_HEIGHT,
                name=f"{c.name}: load per rank and layer, {low:.2f} to {high:.2f}",
                lookup=f"load {len(ranks)} 1 0 {2 + i}",
            ),
            color=color,
        )
        for i, (c, load, color) in enumerate(
            zip(pair.both(), loads, pair.colors(), strict=True)
        )
    ]
    return section(
        "load",
        "Load per rank and layer",
        _lead(pair),
        color_bar(scale, *loads, words="no colour: 1, an even share"),
        grid(*maps, _busiest(comparison, pair), _per_rank(pair, ranks)),
        table,
        skew(comparison, numbers),
        *_unused(comparison, numbers),
    )


def _unused(comparison: Comparison, numbers: Numbers) -> list[Markup]:
    """Experts that no scored token chose: nothing is known of where they belong."""
    statistics = comparison.statistics
    rows = [
        (layer, np.flatnonzero(load == 0).tolist())
        for layer, load in zip(
            statistics.layer_ids.tolist(), statistics.load, strict=True
        )
    ]
    found = [(layer, experts) for layer, experts in rows if experts]
    if not found:
        return []
    count = sum(len(experts) for _, experts in found)
    words = (
        f"No scored token chose {count:,} of {statistics.load.size:,} experts, in "
        f"{len(found)} of {len(rows)} layers. They count as no load; record more "
        f"tokens if your traffic uses them."
    )
    table = numbers.table(
        "unused",
        "Experts that no scored token chose",
        ("layer", "experts", "ids"),
        ((layer, len(ids), " ".join(map(str, ids))) for layer, ids in found),
    )
    return [tag("p", words, class_="note"), table]


def _lead(pair: Pair) -> str:
    parts = [
        f"{number(c.evaluation.imbalance_mean)} times the mean load with {c.name} "
        f"({number(c.evaluation.imbalance_worst)} at worst)"
        for c in pair.both()
    ]
    return (
        f"The busiest rank of a layer is what the others wait for. It has "
        f"{' and '.join(parts)}."
    )


def _busiest(comparison: Comparison, pair: Pair) -> Markup:
    layers = [float(layer) for layer in comparison.statistics.layer_ids]
    lines = [
        Line(
            x=layers,
            y=c.evaluation.imbalance.tolist(),
            color=color,
            dash=dash,
            name=c.name,
        )
        for c, color, dash in zip(
            pair.both(), pair.colors(), pair.dashes(), strict=True
        )
    ]
    drawing = line_chart(
        lines,
        x="layer",
        y="busiest / mean",
        floor=1.0,
        name="Busiest rank over mean rank, by layer",
    )
    return figure("Busiest rank over mean rank", drawing, pair.key())


def _per_rank(pair: Pair, ranks: list[str]) -> Markup:
    lines = []
    for c, color, dash in zip(pair.both(), pair.colors(), pair.dashes(), strict=True):
        rows = pooled(c.evaluation.rank_rows.sum(axis=0), 0)
        share = (rows / (rows.mean() or 1)).tolist()
        at = [float(i) for i in range(len(ranks))]
        lines.append(Line(x=at, y=share, color=color, dash=dash, name=c.name))
    drawing = line_chart(
        lines,
        x="rank" if len(ranks) == len(pair.after.evaluation.traffic) else "rank group",
        y="load / mean",
        floor=1.0,
        name="Load of each rank over all layers",
    )
    return figure("All layers together", drawing, pair.key())
