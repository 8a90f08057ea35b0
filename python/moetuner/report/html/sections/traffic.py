"""Rows from rank to rank, before and after."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from moetuner._core import Rows
from moetuner.evaluation.cost import Homes
from moetuner.report.html.colors import scale_around
from moetuner.report.html.content import Pair, section
from moetuner.report.html.heatmap import color_bar
from moetuner.report.html.pooling import pooled
from moetuner.report.html.rank_maps import RankTables, rank_maps
from moetuner.report.quantities import traffic_per_token
from moetuner.report.words import number

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from moetuner.evaluation.cost import CostModel
    from moetuner.planning.scores import Comparison
    from moetuner.report.html.content import Numbers
    from moetuner.report.html.markup import Markup

_ROWS = {
    Rows.PER_RANK: "one row per remote rank of a token",
    Rows.PER_EXPERT: "one row per expert of a token on a remote rank",
    Rows.TO_ALL: "every row to every rank",
}
_HOMES = {
    Homes.UNIFORM: "tokens start on any rank alike, so that columns are even",
    Homes.RECORDED: "tokens start where they were recorded",
    Homes.FOLLOW: "tokens start where their first expert of the layer before is",
}


def traffic(comparison: Comparison, numbers: Numbers) -> Markup:
    """Heat maps of dispatch rows on one scale."""
    pair = Pair.of(comparison)
    tables = [pooled(traffic_per_token(c.evaluation), 0, 1) for c in pair.both()]
    scale = scale_around(
        _mean(tables), *tables, label="rows per token of an even share", least=0.25
    )
    names = RankTables(
        key="traffic",
        title="Rows per token from home to computing rank, mean over layers",
        what="rows from home to computing rank",
        row="home rank",
        column="computing rank",
    )
    return section(
        "traffic",
        "Traffic between ranks",
        _lead(pair, comparison.cost),
        color_bar(scale, *tables, words="no colour: the mean; grey: crosses no link"),
        *rank_maps(names, comparison.topology, pair, tables, scale, numbers),
    )


def _mean(tables: list[NDArray[np.float64]]) -> float:
    """Mean of what crosses links; 1 where nothing does."""
    values = np.concatenate([table[np.isfinite(table)] for table in tables])
    return float(values.mean()) if values.size and values.any() else 1.0


def _lead(pair: Pair, cost: CostModel) -> str:
    rows, homes = _ROWS[cost.wire.rules.rows], _HOMES[cost.homes]
    text = f"Rows sent to be computed: {rows}; {homes}."
    sent = [c.evaluation.remote_ranks_per_token for c in pair.both()]
    if all(value == value for value in sent):
        words = ", ".join(
            f"{number(value)} with {c.name}"
            for value, c in zip(sent, pair.both(), strict=True)
        )
        text += f" Ranks other than its home that a token visits: {words}."
    return text
