"""What one exchange counted on one rank.

Legend: G ranks, N nodes, R ranks of a node, P slots, K top-k.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from moetuner.placement.model import Placement


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class ExchangeCounts:
    """Traffic of one layer on one rank, since the counters began."""

    rank: int
    tokens: int
    """Tokens that the layer saw here."""
    rows_to_rank: NDArray[np.int64]
    """[G], the own rank too: a token's row travels once to each of its ranks."""
    rows_to_node: NDArray[np.int64]
    """[N], the own node too."""
    slot_choices: NDArray[np.int64]
    """[P], (token, expert) pairs by the slot that computed them."""
    row_bytes: int
    """Of one row, in the dtype that was last seen."""
    rows_passed_on: NDArray[np.int64]
    """[R], with two levels: rows that this rank sent to each rank of its node, itself
    too, of its own tokens and of those that crossed to it. On one level empty."""

    @classmethod
    def of(
        cls,
        counters: NDArray[np.int64],
        placement: Placement,
        row_bytes: int,
        rank: int = 0,
    ) -> ExchangeCounts:
        """Take the counters of `moetuner.ops.dispatch` apart."""
        topology = placement.topology
        ends = np.cumsum([1, topology.num_ranks, topology.num_nodes])
        ends = np.append(ends, ends[-1] + placement.num_slots)
        tokens, ranks, nodes, slots, passed_on = np.split(counters, ends)
        return cls(
            rank=rank,
            tokens=int(tokens[0]),
            rows_to_rank=ranks,
            rows_to_node=nodes,
            slot_choices=slots,
            row_bytes=row_bytes,
            rows_passed_on=passed_on,
        )

    @property
    def rank_rows(self) -> int:
        """Rows that left this rank for others of its node."""
        if len(self.rows_passed_on):
            in_node, own = self.rows_passed_on, self.rank % len(self.rows_passed_on)
        else:
            by_node = self.rows_to_rank.reshape(len(self.rows_to_node), -1)
            node, own = divmod(self.rank, by_node.shape[1])
            in_node = by_node[node]
        return int(in_node.sum() - in_node[own])

    @property
    def node_rows(self) -> int:
        """Rows that left this rank for other nodes."""
        ranks_per_node = len(self.rows_to_rank) // len(self.rows_to_node)
        node = self.rank // ranks_per_node
        to_nodes = self.rows_to_node
        if not len(self.rows_passed_on):  # one for each rank there
            to_nodes = self.rows_to_rank.reshape(len(self.rows_to_node), -1).sum(axis=1)
        return int(to_nodes.sum() - to_nodes[node])

    @property
    def remote_rows(self) -> int:
        """Rows that left this rank, passed on ones too; as many sums return home."""
        return self.rank_rows + self.node_rows

    @property
    def remote_bytes(self) -> int:
        """Bytes of those rows, one way; 8 K more travel with each."""
        return self.remote_rows * self.row_bytes

    @property
    def ranks_per_token(self) -> float:
        """Mean number of distinct ranks that a token visits."""
        return float(self.rows_to_rank.sum() / max(self.tokens, 1))

    @property
    def nodes_per_token(self) -> float:
        """Mean number of distinct nodes that a token visits."""
        return float(self.rows_to_node.sum() / max(self.tokens, 1))

    @property
    def rank_load(self) -> NDArray[np.int64]:
        """[G] (token, expert) pairs that this rank's tokens brought to each rank."""
        load: NDArray[np.int64] = self.slot_choices.reshape(
            len(self.rows_to_rank), -1
        ).sum(axis=1)
        return load
