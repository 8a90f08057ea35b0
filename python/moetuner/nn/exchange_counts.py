"""What one exchange counted on one rank.

Legend: G ranks, N nodes, P slots, K top-k.
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
    """Traffic of one layer from the tokens of one rank, since the counters began."""

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
        tokens, ranks, nodes, slots = np.split(counters, ends)
        return cls(
            rank=rank,
            tokens=int(tokens[0]),
            rows_to_rank=ranks,
            rows_to_node=nodes,
            slot_choices=slots,
            row_bytes=row_bytes,
        )

    @property
    def remote_rows(self) -> int:
        """Rows that left this rank; as many sums come back."""
        return int(self.rows_to_rank.sum() - self.rows_to_rank[self.rank])

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
