"""Rows on the links of a ring, around which all-gather and reduce-scatter send.

NCCL's ring algorithm: each rank passes on to the next what it got, until all have all.
A token crosses every link of the ring but the one into its own home.

Legend: G ranks, N nodes.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from moetuner.placement.topology import Topology

    Floats = NDArray[np.float64]


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class RingRows:
    """Rows that leave and enter ranks [..., G] inside nodes, and nodes [..., N]."""

    rank_egress: Floats
    rank_ingress: Floats
    node_egress: Floats
    node_ingress: Floats

    @classmethod
    def of(cls, sent: Floats, topology: Topology) -> RingRows:
        """Of `sent` rows [..., G] that begin at each rank."""
        node_of = topology.nodes()
        before = np.roll(node_of, 1)
        crosses = (before != node_of).astype(np.float64)
        carried = sent.sum(axis=-1, keepdims=True) - sent  # into each rank
        inside = carried * (1 - crosses)
        nodes = np.eye(topology.num_nodes)
        return cls(
            rank_egress=np.roll(inside, -1, axis=-1),
            rank_ingress=inside,
            node_egress=(carried * crosses) @ nodes[before],
            node_ingress=(carried * crosses) @ nodes[node_of],
        )
