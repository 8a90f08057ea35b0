"""The modelled time of one layer as an integer program.

x[e, g] = 1 when expert e sits on rank g. A token matters only by the experts that it
chose, so tokens that chose the same ones share the variables of what they visit,
y[set, g]::

    min  sum over batches b of  weight[b] (C[b] + Z[b])
    sum_g x[e, g] = 1,     sum_e x[e, g] <= slots
    C[b] >= seconds of rank g's rows, or of its active experts' weights, in batch b
    y[set, g] >= x[e, g] for e in set,     Y[set, n] >= sum of x[e, g] for g in node n
    Z[b] >= seconds, there and back, of each link: a sum of visits y or Y

Where hops follow each other, Z is a sum of two: links inside nodes, and between them.
Links wait for no fewer visits than there are, so y and Y need no integrality, and the
program's value is the evaluator's time of the layer: exactly where homes are uniform;
where they are recorded with latencies always paid. Ranks that differ by nothing are
opened in order.

Legend: E experts, G ranks, N nodes, B batches, M sets, H homes that are told apart.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np

from moetuner._core import Crossing, Hops, LayerPrice, LinkRates, Rows
from moetuner.evaluation.cost import Homes
from moetuner.evaluation.ring import RingRows
from moetuner.solver.programs.layer_links import Level, Way
from moetuner.solver.programs.model import MilpBuilder, MilpModel

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from moetuner.problem import PlacementProblem
    from moetuner.solver.programs.layer_tokens import LayerTokens

    Floats = NDArray[np.float64]
    Ints = NDArray[np.int64]
    RankOf = NDArray[np.int32]

UNITS = 100.0
"""A layer's time in the program: CBC's tolerances are absolute, 1e-5 at the most."""
MIN_SECONDS = 1e-9
"""Taken for the time of a layer that has nothing to do."""
MAX_EXPERTS = 62
"""Sets of experts are 64-bit masks."""


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class LayerProgram:
    """A program, and what its values mean.

    A value v of the program stands for ``latency + unit * v`` seconds of the layer, or
    less than that by ``free_latency`` where a placement needs no row at all.
    """

    model: MilpModel
    num_experts: int
    num_ranks: int
    slots: int
    latency: float
    free_latency: float
    unit: float

    def seconds(self, value: float) -> float:
        """Time of the layer for a value of the program, at most."""
        return self.latency + self.unit * value

    def bound(self, value: float) -> float:
        """Time of the layer at least, when the program is worth at least `value`."""
        return max(self.seconds(value) - self.free_latency, 0.0)

    def read(self, x: Floats) -> RankOf | None:
        """Rank of each expert [E] in a solution; None when it is not legal."""
        shape = (self.num_experts, self.num_ranks)
        chosen = x[: self.num_experts * self.num_ranks].reshape(shape)
        rank_of: RankOf = chosen.argmax(axis=1).astype(np.int32)
        sizes = np.bincount(rank_of, minlength=self.num_ranks)
        if (chosen.max(axis=1) < 0.5).any() or sizes.max() > self.slots:
            return None
        return rank_of


def count_visits(problem: PlacementProblem, tokens: LayerTokens) -> int:
    """Size of the program: M G for sets of several experts, and its E G choices."""
    sets = np.unique(tokens.masks())
    several = int(((sets & (sets - 1)) != 0).sum())
    return (several + problem.num_experts) * problem.topology.num_ranks


def layer_program(
    problem: PlacementProblem, tokens: LayerTokens, rank_of: RankOf, seconds: float
) -> LayerProgram:
    """The program of a layer.

    Parameters
    ----------
    problem
        With objective modelled-time and homes that do not follow, at most
        `MAX_EXPERTS` experts.
    tokens
        Of the layer.
    rank_of
        Ranks [E], CBC's start.
    seconds
        Time of the layer there, which sets the program's unit.
    """
    return _Program(
        problem=problem,
        tokens=tokens,
        unit=max(seconds, MIN_SECONDS) / UNITS,
    ).build(rank_of)


@dataclass(kw_only=True)
class _Program:
    problem: PlacementProblem
    tokens: LayerTokens
    unit: float
    price: LayerPrice = field(init=False)
    builder: MilpBuilder = field(default_factory=MilpBuilder)
    x: Ints = field(init=False)
    """Columns [E, G]."""

    def build(self, start: RankOf) -> LayerProgram:
        problem, num_ranks = self.problem, self.problem.topology.num_ranks
        self.price = problem.workload.cost.layer_price(problem.topology)
        self.x = self.builder.add_columns(
            problem.num_experts, num_ranks, upper=1.0, integer=True
        )
        for choices in self.x:
            self.builder.add_row(choices, lower=1.0, upper=1.0)
        for members in self.x.T:
            self.builder.add_row(members, upper=float(problem.slots_per_rank))
        start = self._open_in_order(start)
        self._compute()
        self._exchange()
        values = np.zeros(len(self.builder))
        values[self.x[np.arange(problem.num_experts), start]] = 1.0
        uniform = problem.workload.cost.homes is Homes.UNIFORM
        latency = self._latency() * float(self.tokens.weight @ self._travels())
        busy = self.tokens.rows.any(axis=1)
        launches = self.price.rates.layer * float(self.tokens.weight @ busy)
        return LayerProgram(
            model=self.builder.build(values),
            num_experts=problem.num_experts,
            num_ranks=num_ranks,
            slots=problem.slots_per_rank,
            latency=latency + launches,
            free_latency=0.0 if uniform else latency,
            unit=self.unit,
        )

    def _open_in_order(self, start: RankOf) -> RankOf:
        """Fix names of ranks that nothing tells apart; the start in those names.

        The i-th heaviest expert opens at most the i-th rank of a node, and at most the
        i-th node.
        """
        topology, cost = self.problem.topology, self.problem.workload.cost
        if cost.homes is not Homes.UNIFORM or not cost.alike(topology):
            return start
        per_node = topology.ranks_per_node
        load = self.tokens.weight @ self.tokens.rows
        place = np.arange(topology.num_ranks)
        new_node: dict[int, int] = {}
        new_rank: dict[int, int] = {}
        opened = np.zeros(topology.num_nodes, np.int64)
        for i, expert in enumerate(np.argsort(-load, kind="stable").tolist()):
            late = (place % per_node > i) | (place // per_node > i)
            self.builder.fix(self.x[expert, late], 0.0)
            rank = int(start[expert])
            node = new_node.setdefault(rank // per_node, len(new_node))
            if rank not in new_rank:
                new_rank[rank] = node * per_node + int(opened[node])
                opened[node] += 1
        named: RankOf = np.array([new_rank[rank] for rank in start.tolist()], np.int32)
        return named

    def _batch_columns(self) -> Ints:
        """A column for each batch, weighed in the objective."""
        columns = self.builder.add_columns(self.tokens.weight.size)
        self.builder.weigh(columns, self.tokens.weight)
        return columns

    def _compute(self) -> None:
        """What the slowest rank takes."""
        cost, num_ranks = self.problem.workload.cost, self.problem.topology.num_ranks
        own = bool(cost.hardware.other_ranks)
        speeds, rows = cost.speeds(num_ranks).tolist(), self.tokens.rows
        planes = [
            [
                rows * (plane.row / self.unit) + (rows > 0) * (plane.expert / self.unit)
                for plane in self.price.planes_of(rank)
            ]
            for rank in range(num_ranks if own else 1)
        ]
        everyone, starts = range(num_ranks), self._starts()
        groups = [[rank] for rank in everyone] if own else [list(everyone)]
        floor = self.price.rates.floor / self.unit
        for batch, column in enumerate(self._batch_columns().tolist()):
            if floor and rows[batch].any():
                self.builder.add_row([column], lower=floor)
            for ranks, of_ranks in zip(groups, planes, strict=True):
                for need in _highest([plane[batch] for plane in of_ranks]):
                    used = np.flatnonzero(need)
                    for rank in ranks:
                        begun = starts.get((batch, rank), [])
                        self.builder.add_row(
                            [column, *self.x[used, rank], *begun],
                            [-1.0, *need[used] / speeds[rank], *[1.0] * len(begun)],
                            upper=0.0,
                        )

    def _starts(self) -> dict[tuple[int, int], list[int]]:
        """A column for each batch and rank that starts later than others: seconds."""
        found: dict[tuple[int, int], list[int]] = {}
        for rank, own in enumerate(self.price.rates.rank_compute):
            start = own.start / self.unit
            for batch, rows in enumerate(self.tokens.rows if start else ()):
                columns = self.builder.add_columns(1)
                for expert in np.flatnonzero(rows).tolist():
                    one = [columns[0], self.x[expert, rank]]
                    self.builder.add_row(one, [1.0, -start], lower=0.0)
                found[batch, rank] = columns.tolist()
        return found

    def _exchange(self) -> None:
        """What the busiest link takes, there and back."""
        topology = self.problem.topology
        if self._sent() is Rows.TO_ALL:
            for number, way in enumerate(self._ways()):
                floors = self._around(way.rates, back=number > 0) / self.unit
                for column, floor in zip(
                    self._batch_columns().tolist(), floors.tolist(), strict=True
                ):
                    self.builder.add_row([column], lower=floor)
            return
        rules = self.problem.workload.cost.wire.rules
        in_turn = rules.hops is Hops.IN_TURN
        by_rank = self._visits(topology.num_ranks)
        visits = [by_rank]
        if topology.num_nodes > 1:
            once = rules.rows is Rows.PER_EXPERT or rules.crossing is Crossing.GATEWAY
            visits.append(
                self._visits(topology.num_nodes) if once else self._together(by_rank)
            )
        for way in self._ways():
            columns = self._batch_columns()
            for number, (level, visited) in enumerate(
                zip(self._levels(way), visits, strict=True)
            ):
                if number and in_turn:  # both kinds of links count, not the slower one
                    columns = self._batch_columns()
                level.add_links(self.builder, columns, visited)

    def _around(self, rates: LinkRates, *, back: bool) -> Floats:
        """Seconds [B] of rows that all go around a ring, whatever the placement."""
        tokens, price, turn = self.tokens, self.price, -1 if back else 1
        num_ranks = self.problem.topology.num_ranks
        everyone = np.zeros(len(tokens.batch), np.int64)
        sent = tokens.count(np.arange(len(tokens.batch)), everyone, 1)[:, 0]
        if sent.shape[1] == 1:  # from any home alike
            sent = np.repeat(sent / num_ranks, num_ranks, axis=1)
        rows = RingRows.of(sent, self.problem.topology)
        ranks = (rows.rank_egress, rows.rank_ingress)[::turn]
        nodes = (rows.node_egress, rows.node_ingress)[::turn]
        seconds: Floats = np.maximum(
            price.busiest_rank(*ranks) * rates.rank_row,
            price.busiest_node(*nodes) * rates.node_row,
        )
        return seconds

    def _ways(self) -> list[Way]:
        """Both directions as one where links are alike: what goes out comes back."""
        rates = self.price.rates
        rank, node = rates.rank_links, rates.node_links
        if not rank.egress and not node.egress:
            return [Way(rates=rates.both_ways, rank=([], []), node=([], []))]
        out = [(link.egress, link.ingress) for link in (rank, node)]
        back = [(link.ingress, link.egress) for link in (rank, node)]
        return [
            Way(rates=rates.dispatch, rank=out[0], node=out[1]),
            Way(rates=rates.combine, rank=back[0], node=back[1]),
        ]

    def _levels(self, way: Way) -> list[Level]:
        """Links of a direction: inside nodes, and between them where there are any."""
        tokens, topology = self.tokens, self.problem.topology
        unlike = ~np.eye(topology.num_ranks, dtype=bool)
        levels = [
            Level.of(
                seconds=way.rates.rank_row / self.unit,
                factors=way.rank,
                pairs=topology.same_node() & unlike,
                out=tokens.rank_out,
            )
        ]
        if topology.num_nodes > 1:
            levels.append(
                Level.of(
                    seconds=way.rates.node_row / self.unit,
                    factors=way.node,
                    pairs=~np.eye(topology.num_nodes, dtype=bool),
                    out=tokens.node_out,
                )
            )
        return levels

    def _together(
        self, by_rank: list[tuple[Ints, Floats]]
    ) -> list[tuple[Ints, Floats]]:
        """Visits of nodes where each of its ranks is sent a row of its own."""
        per_node = self.problem.topology.ranks_per_node
        found = []
        for first in range(0, len(by_rank), per_node):
            columns, counts = zip(*by_rank[first : first + per_node], strict=True)
            found.append((np.concatenate(columns), np.concatenate(counts, axis=1)))
        return found

    def _sent(self) -> Rows:
        return self.problem.workload.cost.wire.rules.rows

    def _visits(self, num_units: int) -> list[tuple[Ints, Floats]]:
        """Of each unit, columns [M] of who visits it, and their counts [B, M, H]."""
        masks = self.tokens.masks()
        token = np.flatnonzero(masks)
        sets, key = np.unique(masks[token], return_inverse=True)
        counts = self.tokens.count(token, key, sets.size)
        experts = np.arange(self.problem.num_experts)
        found = []
        for inside in np.split(self.x, num_units, axis=1):  # [E, ranks of the unit]
            columns = np.empty(sets.size, np.int64)
            for i, each in enumerate(sets.tolist()):
                chosen = experts[(each >> experts & 1) != 0]
                if len(chosen) == 1 and inside.shape[1] == 1:
                    columns[i] = inside[chosen[0], 0]
                    continue
                columns[i] = self.builder.add_columns(1, upper=1.0)[0]
                for expert in chosen:
                    self.builder.add_row(
                        [columns[i], *inside[expert]],
                        [1.0, *-np.ones(inside.shape[1])],
                        lower=0.0,
                    )
            found.append((columns, counts))
        return found

    def _latency(self) -> float:
        """Seconds of both ways that a batch waits for its first rows."""
        topology, links = self.problem.topology, self.price.rates.both_ways
        if topology.num_nodes > 1:
            return links.node_latency
        return links.rank_latency if topology.num_ranks > 1 else 0.0

    def _travels(self) -> NDArray[np.bool_]:
        """Batches [B] with rows that may cross a link."""
        tokens = self.tokens
        if self._sent() is Rows.TO_ALL:
            return np.bincount(tokens.batch, minlength=tokens.weight.size) > 0
        return np.asarray(tokens.rows.any(axis=1))


def _highest(planes: list[Floats]) -> list[Floats]:
    """Those of the planes [E] that another one does not cover."""
    kept: list[Floats] = []
    for plane in planes:
        if not any((other >= plane).all() for other in kept):
            kept = [other for other in kept if not (plane >= other).all()] + [plane]
    return kept
