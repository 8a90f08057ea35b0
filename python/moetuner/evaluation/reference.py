"""Readable twins of the C++ core: slow, plain, and what its tests compare with.

Legend: T tokens, L layers, K top-k, E experts, Q groups, G ranks, N nodes, P slots.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from moetuner._checks import assert_never
from moetuner.evaluation.cost import CostModel, Homes, Wire
from moetuner.evaluation.replica_reference import ReplicaChoice
from moetuner.evaluation.replica_rule import ReplicaRule

if TYPE_CHECKING:
    from moetuner.evaluation.tally import RoutingTally
    from moetuner.placement.model import Placement
    from moetuner.trace import Trace


def count_statistics(trace: Trace) -> dict[str, Any]:
    """Vectorised NumPy twin of ``_core.count_statistics``.

    Returns load [L, E], coactivation [L, E, E] and transitions [L - 1, E, E], int64.
    """
    num_experts, top_k = trace.num_experts, trace.top_k
    ids = trace.topk_ids.astype(np.int64)
    load = np.stack(
        [_count(ids[:, layer], num_experts) for layer in range(ids.shape[1])]
    )
    pairs = [(i, j) for i in range(top_k) for j in range(top_k)]
    coactivation = np.zeros((trace.num_layers, num_experts, num_experts), np.int64)
    transitions = np.zeros((trace.num_layers - 1, num_experts, num_experts), np.int64)
    for layer in range(trace.num_layers):
        for i, j in pairs:
            here = ids[:, layer, i]
            coactivation[layer] += _count_pairs(here, ids[:, layer, j], num_experts)
            if layer + 1 < trace.num_layers:
                there = ids[:, layer + 1, j]
                transitions[layer] += _count_pairs(here, there, num_experts)
    return {"load": load, "coactivation": coactivation, "transitions": transitions}


def _count(ids: Any, num_experts: int) -> Any:
    return np.bincount(ids[ids >= 0].ravel(), minlength=num_experts)


def _count_pairs(first: Any, second: Any, num_experts: int) -> Any:
    both = (first >= 0) & (second >= 0)
    flat = first[both] * num_experts + second[both]
    return np.bincount(flat, minlength=num_experts**2).reshape(num_experts, -1)


def tally_routing(
    trace: Trace,
    placement: Placement,
    wire: Wire,
    homes: Homes,
    rule: ReplicaRule,
    groups: Any,
) -> dict[str, Any]:
    """Twin of ``_core.tally_routing``: every token, from every possible home.

    Returns its int64 arrays, in units of 1 / scale rows.
    """
    return _Walk(trace, placement, wire, homes, rule, groups).run()


def layer_seconds(rows: RoutingTally, cost: CostModel) -> Any:
    """Twin of the core's ``LayerPrice``: compute, dispatch, combine, and the layer.

    float64 [Q, L, 4].
    """
    groups, layers = rows.rank_egress.shape[:2]
    found = np.zeros((groups, layers, 4))
    for group in range(groups):
        for layer in range(layers):
            parts = [
                _slowest_rank(rows, cost, (group, layer)),
                _slowest_link(
                    rows, cost, (group, layer), "", cost.shape.dispatch_bytes
                ),
                _slowest_link(
                    rows, cost, (group, layer), "return_", cost.shape.combine_bytes
                ),
            ]
            found[group, layer] = [*parts, sum(parts)]
    return found


def _slowest_rank(rows: RoutingTally, cost: CostModel, at: tuple[int, int]) -> float:
    """Arithmetic and reading weights overlap; ranks wait for each other."""
    ranks = rows.topology.num_ranks
    slowest = 0.0
    curves = cost.rank_curves(rows.topology) or (cost.compute_curve(),) * ranks
    used = rows.slot_rows if rows.slot_used is None else rows.slot_used
    for slots, with_rows, speed, curve in zip(
        rows.slot_rows[at].reshape(ranks, -1),
        used[at].reshape(ranks, -1) > 0,
        cost.speeds(ranks),
        curves,
        strict=True,
    ):
        seconds = max(
            slots.sum() * plane.row + with_rows.sum() * plane.expert
            for plane in curve.planes
        )
        if seconds:
            slowest = max(slowest, seconds / speed + curve.start)
    if not used[at].any():
        return 0.0
    least = min(curve.start for curve in curves) + cost.hardware.compute_floor
    return float(max(slowest, least) + cost.hardware.layer_overhead)


def _slowest_link(
    rows: RoutingTally,
    cost: CostModel,
    at: tuple[int, int],
    way: str,
    bytes_per_value: float,
) -> float:
    """Links of a kind work side by side; the longest message start counts once.

    Both kinds do, too, but where rows are passed on only when all have crossed.
    """
    row_bytes = cost.shape.hidden_size * bytes_per_value
    slowest, latency = {"rank": 0.0, "node": 0.0}, 0.0
    hardware, topology = cost.hardware, rows.topology
    for kind, bandwidth, start in (
        (
            "rank",
            hardware.inside,
            hardware.latency(topology.ranks_per_node, between_nodes=False),
        ),
        (
            "node",
            hardware.between(topology.ranks_per_node),
            hardware.latency(topology.num_ranks, between_nodes=True),
        ),
    ):
        for side in ("egress", "ingress"):
            links = getattr(rows, f"{way}{kind}_{side}")[at]
            given = getattr(bandwidth, side)
            for place, link in enumerate(links):
                speed = given[place % len(given)]
                slowest[kind] = max(slowest[kind], link * row_bytes / speed)
                if link > 0:
                    latency = start  # of a node's link where there is one: it is last
    kinds = slowest.values()
    seconds = sum(kinds) if cost.wire is Wire.DEDUP else max(kinds)
    return float(seconds + latency)


_BY_HOME = (
    ReplicaRule.SGLANG_STATIC,
    ReplicaRule.VLLM_ASCEND,
    ReplicaRule.TENSORRT_LLM,
)
"""Rules of engines by which the rank that a token comes from matters."""


class _Walk:
    def __init__(
        self,
        trace: Trace,
        placement: Placement,
        wire: Wire,
        homes: Homes,
        rule: ReplicaRule,
        groups: Any,
    ) -> None:
        self.trace, self.placement = trace, placement
        self.choice = ReplicaChoice(trace, placement, homes, rule, groups)
        self.wire, self.homes, self.groups = wire, homes, groups
        self.per_node = placement.topology.ranks_per_node
        self.num_ranks = placement.topology.num_ranks
        num_groups = int(max(groups, default=0)) + 1
        layers, nodes = trace.num_layers, placement.topology.num_nodes

        def zeros(*shape: int) -> Any:
            return np.zeros(shape, np.int64)

        self.out: dict[str, Any] = {
            "slot_rows": zeros(num_groups, layers, placement.num_slots),
            "traffic": zeros(layers, self.num_ranks, self.num_ranks),
            "scale": 1 if homes is Homes.RECORDED else self.num_ranks,
        }
        if homes is Homes.UNIFORM and rule in _BY_HOME:
            self.out["slot_used"] = zeros(num_groups, layers, placement.num_slots)
        for way in ("", "return_"):
            for side in ("egress", "ingress"):
                self.out[f"{way}rank_{side}"] = zeros(
                    num_groups, layers, self.num_ranks
                )
                self.out[f"{way}node_{side}"] = zeros(num_groups, layers, nodes)
        for kind in ("distinct", "remote"):
            self.out[f"{kind}_ranks"] = zeros(num_groups, layers)
            self.out[f"{kind}_nodes"] = zeros(num_groups, layers)

    def run(self) -> dict[str, Any]:
        for token in range(self.trace.num_tokens):
            if self.homes is Homes.RECORDED:
                assert self.trace.home_rank is not None
                self.walk(token, int(self.trace.home_rank[token]))
            else:
                for start in range(self.num_ranks):
                    self.walk(token, start)
        return self.out

    def walk(self, token: int, home: int) -> None:
        """One token through all layers, from one first home."""
        for layer in range(self.trace.num_layers):
            slots = self.slots_of(token, layer, home)
            group = int(self.groups[token])
            for slot in slots.values():
                self.out["slot_rows"][group, layer, slot] += 1
                if "slot_used" in self.out and home == self.choice.source[token][1]:
                    self.out["slot_used"][group, layer, slot] += self.num_ranks
            ranks = [self.rank(slot) for slot in slots.values()]
            end = home
            first = int(self.trace.topk_ids[token, layer, 0])
            if self.homes is Homes.FOLLOW and first in slots:
                end = self.rank(slots[first])
            self.send(group, layer, home, ranks, way="")
            self.send(group, layer, end, ranks, way="return_")
            self.count(group, layer, home, ranks)
            home = end

    def slots_of(self, token: int, layer: int, home: int) -> dict[int, int]:
        """Slot of each chosen expert."""
        experts = self.trace.topk_ids[token, layer]
        return {
            expert: self.choice.slot(token, layer, home, expert)
            for expert in experts[experts >= 0].tolist()
        }

    def send(
        self, group: int, layer: int, home: int, ranks: list[int], way: str
    ) -> None:
        """Count the links between home and ranks; on the way back, the other way."""
        leave, enter = ("egress", "ingress") if not way else ("ingress", "egress")

        def rank_link(source: int, target: int) -> None:
            self.out[f"{way}rank_{leave}"][group, layer, source] += 1
            self.out[f"{way}rank_{enter}"][group, layer, target] += 1

        def node_link(target: int, source: int | None = None) -> None:
            source = self.node(home) if source is None else source
            self.out[f"{way}node_{leave}"][group, layer, source] += 1
            self.out[f"{way}node_{enter}"][group, layer, target] += 1

        if self.wire is Wire.ALLGATHER:  # from rank to next rank, until all have it
            for rank in range(self.num_ranks):
                following = (rank + 1) % self.num_ranks
                if following == home:
                    continue
                if self.node(rank) == self.node(following):
                    rank_link(rank, following)
                else:
                    node_link(self.node(following), self.node(rank))
            return
        targets = self.targets(ranks)
        if not self.has_gateway():
            for rank in targets:
                if self.node(rank) != self.node(home):
                    node_link(self.node(rank))
                elif rank != home:
                    rank_link(home, rank)
            return
        for node in {self.node(rank) for rank in targets} - {self.node(home)}:
            node_link(node)
        for rank in targets:
            gateway = self.node(rank) * self.per_node + home % self.per_node
            if rank != gateway:
                rank_link(gateway, rank)

    def count(self, group: int, layer: int, home: int, ranks: list[int]) -> None:
        distinct = set(ranks)
        nodes = {self.node(rank) for rank in distinct}
        self.out["distinct_ranks"][group, layer] += len(distinct)
        self.out["distinct_nodes"][group, layer] += len(nodes)
        self.out["remote_ranks"][group, layer] += len(distinct - {home})
        self.out["remote_nodes"][group, layer] += len(nodes - {self.node(home)})
        for rank in self.targets(ranks):
            self.out["traffic"][layer, home, rank] += 1

    def targets(self, ranks: list[int]) -> list[int]:
        """Ranks that rows of a token go to, whose experts are on `ranks`."""
        if self.wire in (Wire.DEDUP, Wire.DEDUP_PIPELINED, Wire.DEDUP_RANKS):
            return sorted(set(ranks))
        if self.wire is Wire.PER_EXPERT:
            return ranks
        if self.wire is Wire.ALLGATHER:
            return list(range(self.num_ranks))
        return assert_never(self.wire)

    def has_gateway(self) -> bool:
        """Whether rows enter a node once, at the rank with their home's place."""
        if self.wire in (Wire.DEDUP, Wire.DEDUP_PIPELINED):
            return True
        if self.wire is Wire.DEDUP_RANKS or self.wire is Wire.PER_EXPERT:
            return False
        raise AssertionError(f"rows of {self.wire.value} go around a ring")

    def rank(self, slot: int) -> int:
        return slot // self.placement.slots_per_rank

    def node(self, rank: int) -> int:
        return rank // self.per_node
