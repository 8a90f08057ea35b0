"""How long weights take to get to where a new placement wants them."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from moetuner.evaluation.hardware import LinkOf
from moetuner.evaluation.rates import Bandwidth
from moetuner.placement.moves import replicas_of

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from moetuner.evaluation.hardware import Hardware
    from moetuner.placement.changes import Changes
    from moetuner.placement.model import Placement

    Floats = NDArray[np.float64]


def fetch_seconds(moved: Changes, before: Placement, hardware: Hardware) -> float:
    """Seconds until every rank has fetched what it lacks, all links at work at once.

    A replica comes from a rank of the same node where one holds the expert, over the
    links inside the node; else from another node, over what joins them, and there
    through the network card of each of the two ranks where ranks have their own. Of
    several holders the one that has least to send gives it. The busiest link decides,
    or the busiest pair of ranks where the hardware has a bandwidth for each. Latency,
    and the traffic of serving meanwhile, are left out.

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
    of_pair = np.zeros((moved.num_ranks, moved.num_ranks))
    experts = (moved.layer * before.num_experts + moved.expert).tolist()
    for expert, target, far in zip(
        experts, moved.rank.tolist(), moved.between_nodes.tolist(), strict=True
    ):
        node = target // per_node
        givers = [g for g in holders[expert] if far or g // per_node == node]
        source = min(givers, key=lambda rank: (sent[int(far), rank], rank))
        sent[int(far), source] += 1
        received[int(far), target] += 1
        of_pair[source, target] += 1
    near = _longest(sent[0], received[0], hardware.inside, moved.num_ranks)
    nodes = before.topology.num_nodes
    whole = hardware.between(per_node)
    if hardware.nic_of is LinkOf.RANK:  # a rank cannot use its neighbours' cards
        own = whole.times(1 / per_node)
        of_ranks = Bandwidth(
            egress=tuple(np.repeat(own.spread(nodes)[0], per_node)),
            ingress=tuple(np.repeat(own.spread(nodes)[1], per_node)),
        )
        far_seconds = _longest(sent[1], received[1], of_ranks, moved.num_ranks)
    else:
        out, into = (
            rows[1].reshape(nodes, per_node).sum(axis=1) for rows in (sent, received)
        )
        far_seconds = _longest(out, into, whole, nodes)
    pair = 0.0
    if hardware.pair_bandwidth:
        used = of_pair > 0
        pair = (of_pair[used] / np.array(hardware.pair_bandwidth)[used]).max(initial=0)
    return float(max(near, far_seconds, pair) * moved.expert_bytes)


def _longest(sent: Floats, received: Floats, link: Bandwidth, places: int) -> float:
    """Seconds of the busiest of so many links for a byte of each expert."""
    egress, ingress = link.spread(places)
    return float(max((sent / egress).max(), (received / ingress).max()))
