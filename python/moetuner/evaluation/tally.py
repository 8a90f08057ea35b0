"""Row counts of a placement on a trace: what ranks compute and links carry.

All arrays are additive over tokens, so totals over any set of sequences are sums.
Legend: Q groups of tokens, L layers, G ranks, N nodes, P slots.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any

import numpy as np

import moetuner._core as _core
from moetuner.errors import (
    InvalidPlacementError,
    InvalidTraceError,
    MissingStatisticsError,
)
from moetuner.evaluation.cost import Homes, Wire
from moetuner.evaluation.replica_rule import ReplicaRule, rank_slots, slot_shares
from moetuner.evaluation.ring import RingRows
from moetuner.trace import CountTrace, Trace

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from moetuner.placement.model import Placement
    from moetuner.placement.topology import Topology

    Floats = NDArray[np.float64]


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class RoutingTally:
    """Rows (float64; expectations where homes are uniform), leading axis Q.

    ``slot_rows`` [Q, L, P] counts (token, expert) pairs computed in a slot. The links:
    ``rank_egress``/``rank_ingress`` [Q, L, G] inside a node,
    ``node_egress``/``node_ingress`` [Q, L, N] between nodes, and the same with
    ``return_`` for the way back. ``distinct_*`` and ``remote_*`` [Q, L] sum, over
    tokens, the ranks (nodes) visited and those that are not the home; NaN when the
    source only counted. ``tokens`` [Q].
    """

    topology: Topology
    tokens: Floats
    slot_rows: Floats
    rank_egress: Floats
    rank_ingress: Floats
    node_egress: Floats
    node_ingress: Floats
    return_rank_egress: Floats
    return_rank_ingress: Floats
    return_node_egress: Floats
    return_node_ingress: Floats
    distinct_ranks: Floats
    distinct_nodes: Floats
    remote_ranks: Floats
    remote_nodes: Floats
    traffic: Floats
    """[L, G, G] dispatch rows from home to computing rank, over all groups."""
    slot_used: Floats | None = None
    """[Q, L, P] as ``slot_rows``, but of tokens that are dealt out to the ranks; None
    where it would say the same. Only where a slot has rows counts."""

    def weighted(self, weights: Floats) -> RoutingTally:
        """Sum the groups B times, weighted by float64 [B, Q].

        ``traffic`` has no group axis and stays that of all groups.
        """
        arrays = {
            name: np.tensordot(weights, array, axes=1)
            for name, array in self._additive().items()
        }
        return RoutingTally(topology=self.topology, traffic=self.traffic, **arrays)

    def total(self) -> RoutingTally:
        """Add all groups together: a tally with Q = 1."""
        return self.weighted(np.ones((1, self.tokens.shape[0])))

    def rank_rows(self) -> Floats:
        """Rows computed on each rank, [Q, L, G]."""
        return self._by_rank(self.slot_rows)

    def active_experts(self) -> Floats:
        """Slots of each rank with at least one row, [Q, L, G]."""
        rows = self.slot_rows if self.slot_used is None else self.slot_used
        return self._by_rank((rows > 0).astype(np.float64))

    def _by_rank(self, slots: Floats) -> Floats:
        shape = (*slots.shape[:-1], self.topology.num_ranks, -1)
        rows: Floats = slots.reshape(shape).sum(axis=-1)
        return rows

    def _additive(self) -> dict[str, Floats]:
        skip = ("topology", "traffic")
        arrays = {f.name: getattr(self, f.name) for f in fields(self)}
        return {
            name: array
            for name, array in arrays.items()
            if name not in skip and array is not None
        }


def tally(
    trace: Trace | CountTrace,
    placement: Placement,
    *,
    wire: Wire = Wire.DEDUP,
    homes: Homes = Homes.UNIFORM,
    replica_rule: ReplicaRule = ReplicaRule.MOETUNER,
    groups: NDArray[np.int32] | None = None,
    num_threads: int = 0,
) -> RoutingTally:
    """Count rows exactly, token by token, in the C++ core.

    Parameters
    ----------
    trace
        Tokens to score. A count-only source works under `Wire.ALLGATHER` alone,
        is always grouped as it was recorded, and shares the rows of an expert among
        its replicas, see `moetuner.evaluation.replica_rule.slot_shares`.
    placement
        Slots of the same model's experts; replicas and empty slots are allowed.
    wire, homes
        How rows travel, and from where.
    replica_rule
        Which replica a token goes to.
    groups
        int32 [T], group of each token in 0..Q-1; one group when absent. A rule that
        asks for a token's row counts it among those of its group and source rank;
        without recorded homes a group is dealt out to the ranks.
    num_threads
        0 uses all cores.

    Raises
    ------
    InvalidPlacementError
        When experts or layers are not those of the trace.
    InvalidTraceError
        When `homes` needs something that the trace does not have.
    MissingStatisticsError
        When a count-only source is scored on anything but load.
    """
    check_same_model(trace, placement)
    if isinstance(trace, CountTrace):
        return _tally_counts(trace, placement, wire, replica_rule)
    if homes is Homes.FOLLOW and not trace.ranked:
        raise InvalidTraceError(
            "tally: homes=follow needs each token's first expert, but this trace lists "
            "experts in no order; record weights"
        )
    if homes is Homes.RECORDED and trace.home_rank is None:
        raise InvalidTraceError(
            "tally: homes=recorded, but this trace has no home_rank: it does not say "
            "on which rank a token starts"
        )
    if groups is None:
        groups = np.zeros(trace.num_tokens, np.int32)
    num_groups = int(groups.max()) + 1 if groups.size else 1
    counts: dict[str, Any] = _core.tally_routing(
        trace.topk_ids,
        placement.slot_experts,
        trace.num_experts,
        placement.topology.num_ranks,
        placement.topology.ranks_per_node,
        wire.rules,
        homes,
        replica_rule,
        rank_slots(placement) if replica_rule is ReplicaRule.SGLANG_STATIC else None,
        trace.home_rank,
        groups,
        num_groups,
        num_threads,
    )
    scale = counts.pop("scale")
    return RoutingTally(
        topology=placement.topology,
        tokens=np.bincount(groups, minlength=num_groups).astype(np.float64),
        **{name: array / scale for name, array in counts.items()},
    )


def check_same_model(trace: Trace | CountTrace, placement: Placement) -> None:
    """Refuse a placement whose experts or layers are not those of the trace."""
    wanted, got = trace.layer_ids.tolist(), placement.layer_ids.tolist()
    if trace.num_experts != placement.num_experts or wanted != got:
        raise InvalidPlacementError(
            f"placement is for another model: it has {placement.num_experts} experts "
            f"and layers {_short(got)}, the trace has {trace.num_experts} and "
            f"{_short(wanted)}"
        )


def _tally_counts(
    trace: CountTrace, placement: Placement, wire: Wire, rule: ReplicaRule
) -> RoutingTally:
    if wire.rules.rows is not _core.Rows.TO_ALL:
        raise MissingStatisticsError(
            f"tally: wire={wire.value} needs the experts of each token; this source "
            f"only counted loads, so only wire=allgather can be scored"
        )
    topology = placement.topology
    experts = placement.slot_experts
    layers = np.arange(placement.num_layers)[:, None]
    # Which replica a token uses nobody counted.
    rows = trace.counts[:, layers, experts] * slot_shares(placement, rule)
    tokens = trace.num_tokens.astype(np.float64)
    num_groups, num_layers = trace.counts.shape[:2]
    sent = np.empty((num_groups, num_layers, topology.num_ranks))
    sent[:] = (tokens / topology.num_ranks)[:, None, None]
    ring = RingRows.of(sent, topology)
    unknown = np.full((num_groups, num_layers), np.nan)
    traffic = np.full(
        (num_layers, topology.num_ranks, topology.num_ranks),
        tokens.sum() / topology.num_ranks,
    )
    return RoutingTally(
        topology=topology,
        tokens=tokens,
        slot_rows=rows.astype(np.float64),
        rank_egress=ring.rank_egress,
        rank_ingress=ring.rank_ingress,
        node_egress=ring.node_egress,
        node_ingress=ring.node_ingress,
        return_rank_egress=ring.rank_ingress,
        return_rank_ingress=ring.rank_egress,
        return_node_egress=ring.node_ingress,
        return_node_ingress=ring.node_egress,
        **dict.fromkeys(_PER_TOKEN, unknown),
        traffic=traffic,
    )


_PER_TOKEN = ("distinct_ranks", "distinct_nodes", "remote_ranks", "remote_nodes")


def _short(numbers: list[int]) -> str:
    if len(numbers) <= 4:
        return str(numbers)
    return f"{numbers[0]}..{numbers[-1]} ({len(numbers)})"
