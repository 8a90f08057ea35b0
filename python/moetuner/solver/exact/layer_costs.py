"""What states of one layer cost, from counts of (first expert, expert set).

A token matters to a layer only by its set of experts, and by where it comes from. With
few experts there are few such keys, so thousands of states are priced at once, exactly
as the evaluator prices them token by token.

Legend: B batches, M sets (bit masks of experts), P states, E experts, G ranks, N nodes.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from moetuner._checks import assert_never
from moetuner._core import Crossing, Rows
from moetuner.evaluation.cost import CostModel, Homes, Wire
from moetuner.evaluation.ring import RingRows
from moetuner.evaluation.workload import num_batches
from moetuner.trace import Trace

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from moetuner.evaluation.workload import Workload
    from moetuner.placement.topology import Topology

    Floats = NDArray[np.float64]

_CHUNK_CELLS = 1 << 24


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Batches:
    """Tokens of a workload's batches as sets.

    ``masks`` int64 [T, L], ``first`` int64 [T, L], ``batch`` int64 [T], ``home`` int64
    [T] or None; ``weight`` float64 [B] of each batch in the objective.
    """

    masks: NDArray[np.int64]
    first: NDArray[np.int64]
    batch: NDArray[np.int64]
    home: NDArray[np.int64] | None
    weight: Floats

    @classmethod
    def of(cls, workload: Workload) -> Batches:
        """All traces together, each batch with the weight that it has."""
        masks, first, batch, homes, weight = [], [], [], [], []
        offset = 0
        for trace, batches, share in zip(
            workload.traces, workload.batches, workload.weights, strict=True
        ):
            assert isinstance(trace, Trace)
            ids = trace.topk_ids.astype(np.int64)
            masks.append(np.where(ids >= 0, 1 << np.maximum(ids, 0), 0).sum(axis=2))
            first.append(ids[..., 0])
            batch.append(batches + offset)
            count = num_batches(batches)
            offset += count
            weight += [share / count] * count
            if trace.home_rank is not None:
                homes.append(trace.home_rank.astype(np.int64))
        return cls(
            masks=np.concatenate(masks),
            first=np.concatenate(first),
            batch=np.concatenate(batch),
            home=np.concatenate(homes) if len(homes) == len(masks) else None,
            weight=np.array(weight),
        )

    def counts(self, layer: int, source: NDArray[np.int64], width: int) -> Floats:
        """Tokens by batch, source below `width`, and set at `layer`: [B, width, M]."""
        sets = int(self.masks.max(initial=0)) + 1
        key = (self.batch * width + source) * sets + self.masks[:, layer]
        size = self.weight.size * width * sets
        counted = np.bincount(key, minlength=size).reshape(-1, width, sets)
        return counted.astype(np.float64)


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Visited:
    """What a set visits in a state: float64 [P, M, G] and [P, M, N] rows."""

    ranks: Floats
    nodes: Floats

    @classmethod
    def of(
        cls, states: NDArray[np.int32], num_sets: int, topology: Topology, wire: Wire
    ) -> Visited:
        """Rows of one token with each set, for each state [P, E]."""
        member = (np.arange(num_sets)[:, None] >> np.arange(states.shape[1])) & 1
        onehot = np.eye(topology.num_ranks)[states]  # [P, E, G]
        ranks = np.einsum("me,peg->pmg", member.astype(np.float64), onehot)
        rules = wire.rules
        if rules.rows is Rows.PER_RANK:
            ranks = np.minimum(ranks, 1)
        elif rules.rows is Rows.TO_ALL:
            ranks = np.ones_like(ranks)
        elif rules.rows is not Rows.PER_EXPERT:
            assert_never(rules.rows)
        nodes = ranks.reshape(*ranks.shape[:2], topology.num_nodes, -1).sum(axis=3)
        if rules.crossing is Crossing.GATEWAY:
            nodes = np.minimum(nodes, 1)
        return cls(ranks=ranks, nodes=nodes)


class LayerCosts:
    """Prices states of single layers, weighted over batches."""

    def __init__(
        self,
        batches: Batches,
        states: NDArray[np.int32],
        topology: Topology,
        cost: CostModel,
    ) -> None:
        self.batches, self.states = batches, states
        self.topology, self.cost = topology, cost
        self.price = cost.layer_price(topology)
        self.num_sets = int(batches.masks.max(initial=0)) + 1
        self.visited = Visited.of(states, self.num_sets, topology, cost.wire)

    def own(self, layer: int) -> Floats:
        """Compute, and the directions that only this layer's state decides, [P]."""
        seconds = self._compute(layer)
        follow = self.cost.homes is Homes.FOLLOW
        if follow:
            seconds = seconds + self._exchange(*self._from_first(layer), combine=True)
        if not follow or layer == 0:
            rows = self._from_homes(layer)
            seconds = seconds + self._exchange(*rows, combine=False)
            if not follow:
                seconds = seconds + self._exchange(*rows, combine=True)
        return np.asarray(self.batches.weight @ seconds)

    def rows_from(self, layer: int) -> tuple[Floats, Floats]:
        """Rows at `layer` from tokens by their first expert a layer before.

        float64 [B, P, E, G] to ranks and [B, P, E, N] to nodes.
        """
        num_experts = self.states.shape[1]
        source = self.batches.first[:, layer - 1]
        counts = self.batches.counts(layer, source, num_experts)
        return (
            np.einsum("bfm,pmg->bpfg", counts, self.visited.ranks, optimize=True),
            np.einsum("bfm,pmn->bpfn", counts, self.visited.nodes, optimize=True),
        )

    def _compute(self, layer: int) -> Floats:
        counts = self.batches.counts(layer, np.zeros_like(self.batches.batch), 1)[:, 0]
        num_experts = self.states.shape[1]
        member = (np.arange(self.num_sets)[:, None] >> np.arange(num_experts)) & 1
        rows = counts @ member  # [B, E]
        onehot = np.eye(self.topology.num_ranks)[self.states]
        return self.price.compute(
            np.einsum("be,peg->bpg", rows, onehot),
            np.einsum("be,peg->bpg", (rows > 0) * 1.0, onehot),
        )

    def _from_homes(self, layer: int) -> tuple[Floats, Floats]:
        """Rows from each home to ranks [B, P, G, G] and nodes [B, P, G, N]."""
        num_ranks = self.topology.num_ranks
        if self.cost.homes is Homes.RECORDED:
            assert self.batches.home is not None
            counts = self.batches.counts(layer, self.batches.home, num_ranks)
        else:
            source = np.zeros_like(self.batches.batch)
            counts = self.batches.counts(layer, source, 1) / num_ranks
            counts = np.repeat(counts, num_ranks, axis=1)
        return (
            np.einsum("bhm,pmg->bphg", counts, self.visited.ranks, optimize=True),
            np.einsum("bhm,pmn->bphn", counts, self.visited.nodes, optimize=True),
        )

    def _from_first(self, layer: int) -> tuple[Floats, Floats]:
        """The same from the rank of each token's first expert at the layer itself."""
        num_experts = self.states.shape[1]
        source = self.batches.first[:, layer]
        counts = self.batches.counts(layer, source, num_experts)
        onehot = np.eye(self.topology.num_ranks)[self.states]  # [P, E, G]
        ranks = np.einsum("bfm,pmg->bpfg", counts, self.visited.ranks, optimize=True)
        nodes = np.einsum("bfm,pmn->bpfn", counts, self.visited.nodes, optimize=True)
        return (
            np.einsum("pfh,bpfg->bphg", onehot, ranks, optimize=True),
            np.einsum("pfh,bpfn->bphn", onehot, nodes, optimize=True),
        )

    def _exchange(self, to_ranks: Floats, to_nodes: Floats, *, combine: bool) -> Floats:
        """Seconds of one direction, [B, P]; `combine` goes the other way round."""
        topology, per_node = self.topology, self.topology.ranks_per_node
        ranks, nodes = np.arange(topology.num_ranks), topology.nodes()
        local, same = ranks % per_node, topology.same_node()
        other = nodes[:, None] != np.arange(topology.num_nodes)  # [G, N]
        crossing = self.cost.wire.rules.crossing
        if crossing is Crossing.RING:
            return self._around(to_ranks[..., 0], combine=combine)
        if crossing is Crossing.DIRECT:
            inside = same & ~np.eye(topology.num_ranks, dtype=bool)
            ingress = np.einsum("bphg,hg->bpg", to_ranks, inside)
            egress = np.einsum("bphg,hg->bph", to_ranks, inside)
        else:
            entry = nodes[None, :] * per_node + local[:, None]  # [home, rank]
            moves = entry != ranks
            leaves = (entry[..., None] == ranks) & moves[..., None]  # [home, rank, G]
            ingress = np.einsum("bphg,hg->bpg", to_ranks, moves)
            egress = np.einsum("bphg,hgw->bpw", to_ranks, leaves, optimize=True)
        node_in = np.einsum("bphn,hn->bpn", to_nodes, other)
        node_out = np.einsum("bphn,hn->bph", to_nodes, other)
        node_out = node_out.reshape(*node_out.shape[:2], -1, per_node).sum(axis=3)
        return self._seconds((egress, ingress), (node_out, node_in), combine=combine)

    def _around(self, sent: Floats, *, combine: bool) -> Floats:
        """The same of rows [B, P, G] that go around a ring."""
        rows = RingRows.of(sent, self.topology)
        return self._seconds(
            (rows.rank_egress, rows.rank_ingress),
            (rows.node_egress, rows.node_ingress),
            combine=combine,
        )

    def _seconds(
        self,
        ranks: tuple[Floats, Floats],
        nodes: tuple[Floats, Floats],
        *,
        combine: bool,
    ) -> Floats:
        """Of rows that leave and enter places on the way out, and turn back."""
        price, turn = self.price, -1 if combine else 1
        return price.exchange(
            price.rates.combine if combine else price.rates.dispatch,
            price.busiest_rank(*ranks[::turn]),
            price.busiest_node(*nodes[::turn]),
        )
