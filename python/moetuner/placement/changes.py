"""What has to move when one placement follows another.

Legend: E experts, G ranks. A replica is an expert of one layer on one rank.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from moetuner.placement.moves import fetched_replicas, replicas_of

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from moetuner.placement.model import Placement

    Ints = NDArray[np.int64]


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Changes:
    """Replicas that ranks must fetch; what they drop costs nothing.

    Parameters
    ----------
    layer, expert, rank
        int64 [M], the replicas to fetch: layer index, expert, rank that fetches.
    between_nodes
        bool [M], whether no rank of the same node had the expert before.
    num_replicas
        Replicas of the new placement in all.
    num_ranks
        Ranks G.
    expert_bytes
        Bytes of one expert's weights.
    """

    layer: Ints
    expert: Ints
    rank: Ints
    between_nodes: NDArray[np.bool_]
    num_replicas: int
    num_ranks: int
    expert_bytes: float

    @property
    def num_moved(self) -> int:
        """Replicas to fetch M."""
        return len(self.layer)

    @property
    def bytes_moved(self) -> float:
        """Bytes to fetch, all ranks together."""
        return self.num_moved * self.expert_bytes

    def per_rank(self, *, between_nodes: bool | None = None) -> Ints:
        """Replicas that each rank fetches, int64 [G]; all, or those of one kind."""
        ranks = self.rank
        if between_nodes is not None:
            ranks = ranks[self.between_nodes == between_nodes]
        return np.bincount(ranks, minlength=self.num_ranks)


def changes(before: Placement, after: Placement, expert_bytes: float) -> Changes:
    """Replicas in `after` that their rank did not hold in `before`.

    Both are of the same model and machine.
    """
    ranks, per_node = after.topology.num_ranks, after.topology.ranks_per_node
    fetched = fetched_replicas(before, after)
    place, rank = np.divmod(fetched, ranks)
    layer, expert = np.divmod(place, after.num_experts)
    nodes = after.topology.num_nodes
    had = np.unique(_on_node(replicas_of(before), ranks, per_node, nodes))
    return Changes(
        layer=layer,
        expert=expert,
        rank=rank,
        between_nodes=~np.isin(_on_node(fetched, ranks, per_node, nodes), had),
        num_replicas=len(replicas_of(after)),
        num_ranks=ranks,
        expert_bytes=expert_bytes,
    )


def _on_node(replicas: Ints, ranks: int, per_node: int, nodes: int) -> Ints:
    place, rank = np.divmod(replicas, ranks)
    on_node: Ints = place * nodes + rank // per_node
    return on_node
