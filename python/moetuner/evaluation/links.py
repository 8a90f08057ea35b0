"""Rows on every link, as an exchange counted them.

Legend: L layers, G ranks, N nodes, R ranks of a node.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from moetuner.errors import InvalidTraceError

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from moetuner.evaluation.verify import ExchangeRecord
    from moetuner.placement.topology import Topology


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class LinkRows:
    """Rows on the way out, by the names that `RoutingTally` has for them.

    Where sums return home as many come back, the other way round. Times the bytes of a
    row they are the bytes on each link.
    """

    rank_egress: NDArray[np.int64]
    """[L, G], to other ranks of the node."""
    rank_ingress: NDArray[np.int64]
    """[L, G]"""
    node_egress: NDArray[np.int64]
    """[L, N], to other nodes."""
    node_ingress: NDArray[np.int64]
    """[L, N]"""


def link_rows(record: ExchangeRecord, topology: Topology) -> LinkRows:
    """What was counted, link by link.

    The evaluator prices these rows under `Wire.DEDUP`, and those of an exchange on one
    level under `Wire.DEDUP_RANKS`: rows of its tally of the same tokens, `homes` as
    recorded or as they follow, are equal.

    Raises
    ------
    InvalidTraceError
        When the counters are of other ranks.
    """
    num_ranks, num_nodes = topology.num_ranks, topology.num_nodes
    in_node, counts = topology.ranks_per_node, record.counts
    several = 1 < in_node < num_ranks
    rest = (counts.shape[2] - 1 - num_nodes) % num_ranks  # whole slots of all ranks
    if counts.shape[1] != num_ranks or rest not in ((0, in_node) if several else (0,)):
        raise InvalidTraceError(
            f"link_rows: wanted counters of {num_ranks} ranks on {num_nodes} nodes, "
            f"got {counts.shape[1]} ranks and {counts.shape[2]} columns"
        )
    layers, two_levels = len(counts), rest != 0
    to_rank, to_node = np.split(
        counts[..., 1 : 1 + num_ranks + num_nodes], [num_ranks], 2
    )
    # From each rank to each, told apart by their nodes.
    apart = to_rank.reshape(layers, num_nodes, in_node, num_nodes, in_node)
    inside = counts[..., -in_node:] if two_levels else np.einsum("lnina->lnia", apart)
    inside = _without_own(inside.reshape(layers, num_nodes, in_node, in_node))
    between = to_node.reshape(layers, num_nodes, in_node, num_nodes).sum(axis=2)
    if several and not two_levels:
        between = apart.sum(axis=(2, 4))
    between = _without_own(between)
    return LinkRows(
        rank_egress=inside.sum(axis=-1).reshape(layers, num_ranks),
        rank_ingress=inside.sum(axis=-2).reshape(layers, num_ranks),
        node_egress=between.sum(axis=-1),
        node_ingress=between.sum(axis=-2),
    )


def _without_own(rows: NDArray[np.int64]) -> NDArray[np.int64]:
    """[..., n, n] with zeros where from and to are the same."""
    others = ~np.eye(rows.shape[-1], dtype=bool)
    kept: NDArray[np.int64] = rows * others
    return kept
