"""One layer as an integer program: some ranks' experts free, all others where they are.

x[e, g] = 1 when free expert e sits on free rank g. A token matters only by the free
experts that it chose, so tokens that chose the same ones share the variables of what
they visit, y[set, g]::

    min  sum over batches b of  weight[b] (C[b] + Z[b])
    sum_g x[e, g] = 1,     sum_e x[e, g] <= slots
    C[b] >= seconds of rank g's rows, or of its active experts' weights, in batch b
    y[set, g] >= x[e, g] for e in set,     Y[set, n] >= sum of x[e, g] for g in node n
    Z[b] >= seconds, there and back, of each link: a sum of visits y or Y

Links wait for no fewer visits than there are, so y and Y need no integrality, and the
program's value is the evaluator's time of the layer: exactly where homes are uniform;
where they are recorded with latencies always paid. Ranks that differ by nothing are
opened in order.

Legend: E experts, G ranks, N nodes, B batches, F free experts, R free ranks, M sets.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np

from moetuner.evaluation.cost import Homes, Wire
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
LEAST_SECONDS = 1e-9
"""Taken for the time of a layer that has nothing to do."""
MAX_FREE_EXPERTS = 62
"""Sets of free experts are 64-bit masks."""


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class LayerProgram:
    """A program, and what its columns mean.

    A value v of the program stands for ``constant + unit * v`` seconds of the layer.
    """

    model: MilpModel
    rank_of: RankOf
    experts: Ints
    ranks: Ints
    most: int
    constant: float
    unit: float

    def seconds(self, value: float) -> float:
        """Time of the layer for a value (or bound) of the program."""
        return self.constant + self.unit * value

    def read(self, x: Floats) -> RankOf | None:
        """Rank of each expert [E] in a solution; None when it is not legal."""
        shape = (self.experts.size, self.ranks.size)
        chosen = x[: self.experts.size * self.ranks.size].reshape(shape)
        sizes = np.bincount(chosen.argmax(axis=1), minlength=self.ranks.size)
        if (chosen.max(axis=1) < 0.5).any() or sizes.max() > self.most:
            return None
        found: RankOf = self.rank_of.copy()
        found[self.experts] = self.ranks[chosen.argmax(axis=1)]
        return found


def count_visits(
    problem: PlacementProblem, tokens: LayerTokens, rank_of: RankOf, ranks: Ints
) -> int:
    """Size of the program: M R for sets of several experts, and its F R choices.

    More than `MAX_FREE_EXPERTS` have no program: then it is too large a number.
    """
    experts = np.flatnonzero(np.isin(rank_of, ranks))
    if experts.size > MAX_FREE_EXPERTS:
        return int(np.iinfo(np.int64).max)
    sets = np.unique(tokens.masks(experts, problem.num_experts))
    several = int(((sets & (sets - 1)) != 0).sum())
    return (several + experts.size) * ranks.size


def layer_program(
    problem: PlacementProblem,
    tokens: LayerTokens,
    rank_of: RankOf,
    ranks: Ints,
    seconds: float,
) -> LayerProgram:
    """The program that frees the experts on ``ranks``.

    Parameters
    ----------
    problem
        With objective modelled-time, homes that do not follow, no memory row.
    tokens
        Of the layer.
    rank_of
        Ranks [E] now: where fixed experts stay, and CBC's start.
    ranks
        The free ranks, ascending.
    seconds
        Time of the layer now, which sets the program's unit.
    """
    return _Program(
        problem=problem,
        tokens=tokens,
        rank_of=rank_of,
        ranks=ranks,
        unit=max(seconds, LEAST_SECONDS) / UNITS,
    ).build()


@dataclass(kw_only=True)
class _Program:
    problem: PlacementProblem
    tokens: LayerTokens
    rank_of: RankOf
    ranks: Ints
    unit: float
    builder: MilpBuilder = field(default_factory=MilpBuilder)
    x: Ints = field(init=False)
    """Columns [F, R]."""
    experts: Ints = field(init=False)

    def build(self) -> LayerProgram:
        self.experts = np.flatnonzero(np.isin(self.rank_of, self.ranks))
        shape = (self.experts.size, self.ranks.size)
        self.x = self.builder.add_columns(*shape, upper=1.0, integer=True)
        equal = self.problem.equal_slots
        most = self.problem.slots_per_rank if equal else self.problem.num_experts
        for choices in self.x:
            self.builder.add_row(choices, lower=1.0, upper=1.0)
        for members in self.x.T:
            self.builder.add_row(
                members, lower=0.0 if equal else 1.0, upper=float(most)
            )
        start = self._open_in_order()
        self._compute()
        self._exchange()
        values = np.zeros(len(self.builder))
        place = np.searchsorted(self.ranks, start[self.experts])
        values[self.x[np.arange(self.experts.size), place]] = 1.0
        return LayerProgram(
            model=self.builder.build(values),
            rank_of=self.rank_of,
            experts=self.experts,
            ranks=self.ranks,
            most=most,
            constant=self._latency(),
            unit=self.unit,
        )

    def _open_in_order(self) -> RankOf:
        """Fix names of free ranks that nothing tells apart; the start in those names.

        The i-th heaviest expert opens at most the i-th free rank of a node, and where
        all ranks are free at most the i-th node.
        """
        workload, topology = self.problem.workload, self.problem.topology
        assert workload is not None
        cost = workload.cost
        if cost.homes is not Homes.UNIFORM or not cost.equal_speeds:
            return self.rank_of
        load = self.tokens.weight @ self.tokens.rows
        order = np.argsort(-load[self.experts], kind="stable")
        node = topology.nodes()[self.ranks]
        first = np.searchsorted(node, node)
        position = np.arange(self.ranks.size) - first  # among the free ranks of a node
        whole = self.ranks.size == topology.num_ranks
        start: RankOf = self.rank_of.copy()
        new_node: dict[int, int] = {}
        new_rank: dict[int, int] = {}
        opened = np.zeros(topology.num_nodes, np.int64)
        for i, expert in enumerate(order.tolist()):
            late = position > i
            if whole:
                late |= node > i
            self.builder.fix(self.x[expert, late], 0.0)
            rank = int(self.rank_of[self.experts[expert]])
            old = rank // topology.ranks_per_node
            new = new_node.setdefault(old, len(new_node)) if whole else old
            if rank not in new_rank:
                at = int(np.searchsorted(node, new)) + int(opened[new])
                new_rank[rank], opened[new] = int(self.ranks[at]), opened[new] + 1
            start[self.experts[expert]] = new_rank[rank]
        return start

    def _least(self, floors: Floats) -> Ints:
        """A column for each batch, weighed in the objective, not below `floors` [B]."""
        columns = self.builder.add_columns(floors.size)
        self.builder.weigh(columns, self.tokens.weight)
        for column, floor in zip(columns.tolist(), floors.tolist(), strict=True):
            self.builder.add_row([column], lower=floor)
        return columns

    def _compute(self) -> None:
        """What the slowest rank takes."""
        workload, num_ranks = self.problem.workload, self.problem.topology.num_ranks
        assert workload is not None
        shape, hardware = workload.cost.shape, workload.cost.hardware
        rows = self.tokens.rows
        arithmetic = rows * (shape.flops_per_row / hardware.matmul_rate) / self.unit
        weights = (rows > 0) * (shape.expert_bytes / hardware.memory_bandwidth)
        weights = weights / self.unit
        speeds = workload.cost.speeds(num_ranks)
        onehot = np.eye(num_ranks)[self.rank_of]
        onehot[self.experts] = 0.0
        fixed = np.maximum(arithmetic @ onehot, weights @ onehot) / speeds
        slowest = self._least(fixed.max(axis=1))
        kinds = [arithmetic[:, self.experts], weights[:, self.experts]]
        for batch, column in enumerate(slowest.tolist()):
            here = [kind[batch] for kind in kinds]
            if (here[0] >= here[1]).all():
                del here[1]
            elif (here[0] <= here[1]).all():
                del here[0]
            for need in here:
                for members, speed in zip(
                    self.x.T, speeds[self.ranks].tolist(), strict=True
                ):
                    used = np.flatnonzero(need)
                    self.builder.add_row(
                        [column, *members[used]], [-1.0, *need[used] / speed], upper=0.0
                    )

    def _exchange(self) -> None:
        """What the busiest link takes, there and back."""
        tokens, topology = self.tokens, self.problem.topology
        workload, num_nodes = self.problem.workload, topology.num_nodes
        assert workload is not None
        hardware, shape = workload.cost.hardware, workload.cost.shape
        row = shape.hidden_size * (shape.dispatch_bytes + shape.combine_bytes)
        placed = self.rank_of.copy()
        placed[self.experts] = -1
        masks = tokens.masks(self.experts, self.problem.num_experts)
        visits = tokens.fixed_visits(placed, topology.num_ranks)
        free_ranks, free_nodes = self.ranks, np.unique(topology.nodes()[self.ranks])
        if workload.cost.wire is Wire.ALLGATHER:
            visits[:], free_ranks, free_nodes = True, self.ranks[:0], free_nodes[:0]
        by_node = visits.reshape(-1, num_nodes, topology.ranks_per_node)
        node_visits: NDArray[np.bool_] = np.asarray(by_node.any(axis=2))
        if free_nodes.size == 1:  # then who chose a free expert visits its node
            node_visits[:, free_nodes[0]] |= masks > 0
            free_nodes = free_nodes[:0]
        same, unlike = topology.same_node(), ~np.eye(topology.num_ranks, dtype=bool)
        node_seconds = row / (hardware.nic_bandwidth * topology.ranks_per_node)
        levels = [
            _Level(
                seconds=row / hardware.rank_bandwidth / self.unit,
                pairs=same & unlike,
                out=tokens.rank_out,
                fixed=_count_fixed(tokens, visits),
                free=self._visits(masks, visits, free_ranks, self.ranks),
            ),
            _Level(
                seconds=node_seconds / self.unit,
                pairs=~np.eye(num_nodes, dtype=bool),
                out=tokens.node_out,
                fixed=_count_fixed(tokens, node_visits),
                free=self._visits(
                    masks, node_visits, free_nodes, topology.nodes()[self.ranks]
                ),
            ),
        ]
        floors = np.max([level.floors() for level in levels], axis=0)
        busiest = self._least(floors)
        for level in levels:
            level.add_links(self.builder, busiest)

    def _visits(
        self, masks: Ints, visited: NDArray[np.bool_], free: Ints, units: Ints
    ) -> dict[int, tuple[Ints, Floats]]:
        """Columns [M] of who visits each of ``free``, and their counts [B, M, H].

        ``units`` [R] says what each free rank belongs to.
        """
        found = {}
        for unit in free.tolist():
            token = np.flatnonzero((masks > 0) & ~visited[:, unit])
            sets, key = np.unique(masks[token], return_inverse=True)
            columns = np.empty(sets.size, np.int64)
            inside = self.x[:, units == unit]
            for i, each in enumerate(sets.tolist()):
                chosen = [e for e in range(self.experts.size) if each >> e & 1]
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
            found[unit] = (columns, self.tokens.count(token, key, sets.size))
        return found

    def _latency(self) -> float:
        """Seconds of both ways that every batch with a row pays."""
        workload, topology = self.problem.workload, self.problem.topology
        assert workload is not None
        hardware, tokens = workload.cost.hardware, self.tokens
        travels = tokens.rows.any(axis=1)
        if workload.cost.wire is Wire.ALLGATHER:
            travels = np.bincount(tokens.batch, minlength=tokens.weight.size) > 0
        seconds = 0.0
        if topology.num_nodes > 1:
            seconds = hardware.node_latency
        elif topology.num_ranks > 1:
            seconds = hardware.rank_latency
        return 2 * seconds * float(tokens.weight @ travels)


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class _Level:
    """Links between ranks of a node, or between nodes: U of either.

    ``pairs`` [U, U] says between whom a row goes, ``out`` [H, U] the share of a home's
    rows that leave through a unit, ``fixed`` [B, U, H] the visits that are decided,
    ``free`` those that are not, as `_Program._visits` gives them.
    """

    seconds: float
    pairs: NDArray[np.bool_]
    out: Floats
    fixed: Floats
    free: dict[int, tuple[Ints, Floats]]

    def carried(self) -> Floats:
        """Decided rows into a unit from another, [B, U, U]."""
        rows: Floats = (self.fixed @ self.out) * self.pairs
        return rows

    def floors(self) -> Floats:
        """Seconds of the busiest link, by decided rows alone, [B]."""
        rows = self.carried()
        ways = np.concatenate([rows.sum(axis=2), rows.sum(axis=1)], axis=1)
        floors: Floats = self.seconds * ways.max(axis=1)
        return floors

    def add_links(self, builder: MilpBuilder, busiest: Ints) -> None:
        """Rows that keep every undecided link below ``busiest`` [B]."""
        decided, shared = self.carried(), len(self.out) == 1
        ingress, egress = decided.sum(axis=2), decided.sum(axis=1)
        for batch, column in enumerate(busiest.tolist()):
            leaving: dict[int, list[int]] = {}
            for unit, (visits, counts) in self.free.items():
                ways: list[int] = []
                senders = np.flatnonzero(self.pairs[unit]).tolist()
                rows = self.seconds * counts[batch] @ self.out  # [M, U]
                for sender in senders:
                    # From uniform homes all senders send alike: one column will do.
                    if not (shared and ways):
                        ways.append(_add_sum(builder, visits, rows[:, sender]))
                    leaving.setdefault(sender, []).append(ways[-1])
                if ways:
                    factor = float(len(senders)) if shared else 1.0
                    builder.add_row(
                        [column, *ways],
                        [1.0, *np.full(len(ways), -factor)],
                        lower=self.seconds * float(ingress[batch, unit]),
                    )
            for sender, rows_out in leaving.items():
                builder.add_row(
                    [column, *rows_out],
                    [1.0, *-np.ones(len(rows_out))],
                    lower=self.seconds * float(egress[batch, sender]),
                )


def _add_sum(builder: MilpBuilder, columns: Ints, factors: Floats) -> int:
    """A column that is at least the sum of others."""
    total = int(builder.add_columns(1)[0])
    used = np.flatnonzero(factors)
    builder.add_row([total, *columns[used]], [1.0, *-factors[used]], lower=0.0)
    return total


def _count_fixed(tokens: LayerTokens, visited: NDArray[np.bool_]) -> Floats:
    """Visits that are decided, by batch, unit and home, [B, U, H]."""
    token, unit = np.nonzero(visited)
    return tokens.count(token, unit, visited.shape[1])
