"""What has to move from the one placement to the other."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from moetuner.report.changes import words_of
from moetuner.report.html.charts import Part, column_chart
from moetuner.report.html.colors import scale_from_zero
from moetuner.report.html.content import Pair, figure, grid, section
from moetuner.report.html.frame import key
from moetuner.report.html.heatmap import Axis, color_bar, heatmap
from moetuner.report.html.palette import PARTS
from moetuner.report.html.pooling import node_lines, pooled, rank_labels

if TYPE_CHECKING:
    from moetuner.placement.changes import Changes
    from moetuner.planning.scores import Comparison
    from moetuner.report.html.content import Numbers
    from moetuner.report.html.markup import Markup

_KINDS = ("from its own node", "from another node")


def moves(comparison: Comparison, moved: Changes, numbers: Numbers) -> Markup:
    """Replicas to fetch by rank, and by layer and rank."""
    pair = Pair.of(comparison)
    title = "What changes"
    if not pair.differ:
        return section("moves", title, "There is one placement: nothing changes.")
    if not moved.num_moved:
        lead = f"Nothing moves: each rank holds what {pair.after.name} wants of it."
        return section("moves", title, lead)
    ranks = rank_labels(moved.num_ranks)
    table = numbers.table(
        "moves",
        "Replicas to fetch",
        ("layer", "expert", "to rank", "from another node"),
        zip(
            comparison.statistics.layer_ids[moved.layer].tolist(),
            moved.expert.tolist(),
            moved.rank.tolist(),
            np.where(moved.between_nodes, "yes", "no").tolist(),
            strict=True,
        ),
    )
    parts = [
        Part(
            values=(pooled(fetched, 0) * (moved.expert_bytes / 1e9)).tolist(),
            color=color,
            name=kind,
        )
        for kind, color, fetched in zip(
            _KINDS,
            (PARTS[1].css, PARTS[0].css),
            (
                moved.per_rank(between_nodes=False).astype(float),
                moved.per_rank(between_nodes=True).astype(float),
            ),
            strict=True,
        )
    ]
    drawing = column_chart(
        parts, ranks, x="rank", y="GB to fetch", name="Weights that each rank fetches"
    )
    legend = key([(part.color, "area", part.name) for part in parts])
    return section(
        "moves",
        title,
        _lead(comparison, pair, moved),
        grid(
            figure("Weights to fetch, by rank", drawing, legend),
            _where(comparison, moved, ranks),
        ),
        table,
    )


def _lead(comparison: Comparison, pair: Pair, moved: Changes) -> str:
    return (
        f"From {pair.before.name} to {pair.after.name}: {words_of(comparison, moved)}"
    )


def _where(comparison: Comparison, moved: Changes, ranks: list[str]) -> Markup:
    layers = [str(layer) for layer in comparison.statistics.layer_ids]
    topology = comparison.topology
    fetched = np.zeros((moved.num_ranks, len(layers)))
    np.add.at(fetched, (moved.rank, moved.layer), 1.0)
    fetched = pooled(fetched, 0)
    scale = scale_from_zero(fetched, label="replicas to fetch")
    drawing = heatmap(
        fetched,
        scale,
        x=Axis(name="layer", labels=layers),
        y=Axis(
            name="rank",
            labels=ranks,
            lines=node_lines(topology.num_ranks, topology.ranks_per_node),
        ),
        height=190.0,
        name="Replicas to fetch by rank and layer",
    )
    return figure("By rank and layer", drawing, color_bar(scale, fetched))
