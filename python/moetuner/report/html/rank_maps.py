"""Heat maps of rank against rank, before and after on one scale."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

from moetuner.report.html.content import Pair, figure, grid
from moetuner.report.html.heatmap import Axis, heatmap
from moetuner.report.html.pooling import node_lines, rank_labels

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from moetuner.placement.topology import Topology
    from moetuner.report.html.colors import Scale
    from moetuner.report.html.content import Numbers
    from moetuner.report.html.markup import Markup


class RankTables(NamedTuple):
    """What the maps show, and how it is called."""

    key: str
    """Of the numbers."""
    title: str
    what: str
    """Behind each placement's name."""
    row: str
    column: str


class RankMaps(NamedTuple):
    """The maps side by side, and their numbers."""

    maps: Markup
    numbers: Markup


def rank_maps(
    names: RankTables,
    topology: Topology,
    pair: Pair,
    tables: list[NDArray[np.float64]],
    scale: Scale,
    numbers: Numbers,
) -> RankMaps:
    """Draw the `tables` [G, G] of both placements, and list them."""
    ranks = rank_labels(topology.num_ranks)
    lines = node_lines(topology.num_ranks, topology.ranks_per_node)
    maps = [
        figure(
            c.name,
            heatmap(
                table,
                scale,
                x=Axis(name=names.column, labels=ranks, lines=lines),
                y=Axis(name=names.row, labels=ranks, lines=lines),
                name=f"{c.name}: {names.what}",
                lookup=f"{names.key} 1 {len(ranks)} 0 {2 + i}",
            ),
            color=color,
        )
        for i, (c, table, color) in enumerate(
            zip(pair.both(), tables, pair.colors(), strict=True)
        )
    ]
    listed = numbers.table(
        names.key,
        names.title,
        (names.row, names.column, *(c.name for c in pair.both())),
        (
            (a, b, *(float(table[i, j]) for table in tables))
            for i, a in enumerate(ranks)
            for j, b in enumerate(ranks)
        ),
    )
    return RankMaps(grid(*maps), listed)
