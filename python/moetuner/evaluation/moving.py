"""How long weights take to get to where a new placement wants them."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from moetuner.placement.moves import replicas_of

if TYPE_CHECKING:
    from moetuner.evaluation.hardware import Hardware
    from moetuner.placement.changes import Changes
    from moetuner.placement.model import Placement


def fetch_seconds(moved: Changes, before: Placement, hardware: Hardware) -> float:
    """Seconds until every rank has fetched what it lacks, all links at work at once.

    A replica comes from a rank of the same node where one holds the expert, at
    the bandwidth inside; else from another node, through the NIC of each of the two
    ranks, at the bandwidth between. Of several holders the one that has least to send
    gives it. The busiest link decides; latency, and the traffic of serving meanwhile,
    are left out.

    Parameters
    ----------
    moved
        `moetuner.placement.changes.changes` from `before` to the new placement.
    before
        Where experts are now.
    hardware
        Whose links they cross.
    """
    per_node = before.topology.ranks_per_node
    holders: dict[int, list[int]] = {}
    for replica in replicas_of(before).tolist():
        expert, rank = divmod(replica, moved.num_ranks)
        holders.setdefault(expert, []).append(rank)
    sent = np.zeros((2, moved.num_ranks))
    received = np.zeros((2, moved.num_ranks))
    experts = (moved.layer * before.num_experts + moved.expert).tolist()
    for expert, target, far in zip(
        experts, moved.rank.tolist(), moved.between_nodes.tolist(), strict=True
    ):
        node = target // per_node
        givers = [g for g in holders[expert] if far or g // per_node == node]
        source = min(givers, key=lambda rank: (sent[int(far), rank], rank))
        sent[int(far), source] += 1
        received[int(far), target] += 1
    busiest = np.maximum(sent.max(axis=1), received.max(axis=1))
    bandwidths = (hardware.inside.slowest, hardware.between(1).slowest)
    return float((busiest * moved.expert_bytes / bandwidths).max())
