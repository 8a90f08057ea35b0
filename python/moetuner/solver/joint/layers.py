"""Rounds of annealing, every layer for itself: what homes that stay allow.

Legend: L layers, E experts, G ranks, N nodes of m ranks, P slots.
"""

from __future__ import annotations

import enum
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

import moetuner._core as _core
from moetuner.evaluation.cost import Homes
from moetuner.solver.base import place
from moetuner.solver.joint.scenarios import (
    Scenarios,
    SearchProfile,
    first_homes,
    make_scenarios,
    members,
    search_problem,
)

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from moetuner.placement.model import Placement
    from moetuner.problem import PlacementProblem
    from moetuner.solver.base import SolverOptions
    from moetuner.solver.joint.interruptible import Interruptible

    RankOf = NDArray[np.int32]
    Floats = NDArray[np.float64]

HOT, COLD = 1.0, 0.1
"""Temperatures, in units of the median |change| of a random swap."""
WARM, COOL = 0.05, 0.002
"""The same where experts have found their nodes already."""


class Way(enum.Enum):
    """Where a round begins."""

    RANKS = "ranks"
    """At the balanced placement, with all ranks at once."""
    NODES = "nodes"
    """With the nodes alone, as if each were one rank; then ranks inside them."""


@dataclass(kw_only=True)
class LayerRounds:
    """Annealing of every layer for itself; the best of each layer is kept."""

    problem: PlacementProblem
    options: SolverOptions
    profile: SearchProfile
    start: RankOf
    runner: Interruptible
    stay: Placement | None = None
    move_seconds: float = 0.0
    rank_of: RankOf = field(init=False)
    cost: Floats = field(init=False)
    _members: RankOf = field(init=False)
    _search: _core.SearchProblem = field(init=False)
    _home: RankOf | None = None
    _scenarios: Scenarios = field(init=False)
    _rounds: int = 0
    _open: list[Way] = field(init=False)
    _settled: bool = False
    _last: dict[Way, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        workload = self.problem.workload
        self._scenarios = make_scenarios(workload, self.profile.scenario_tokens)
        self._members = members(self.problem, self.start)
        cost = workload.cost
        if cost.homes is Homes.RECORDED and cost.wire.rules.once_per_place:
            self._home = first_homes(self.problem, self._scenarios)
        self._search = self._problem()
        self.rank_of = self.start
        self.cost = np.full(self.problem.num_layers, np.inf)
        self._open = self.ways()

    def round(self, proposals: int, seconds: float) -> bool:
        """Anneal all layers every open way; whether any of them is better now."""
        before = self.cost
        for way in self._open:
            self._try(way, proposals, seconds / len(self._open))
        return bool((self.cost < before).any())

    @property
    def placement(self) -> Placement:
        """The best found so far."""
        return place(self.problem, self.rank_of)

    def settle(self) -> int:
        """Keep to the way that went best last time; of how many it is one."""
        number = len(self._open)
        self._open = [min(self._open, key=lambda way: self._last.get(way, np.inf))]
        self._settled = True
        return number

    def _try(self, way: Way, proposals: int, seconds: float) -> None:
        self._rounds += 1
        seed = self.options.round_seed(self._rounds)
        found, cost = self.runner.run(
            lambda stop: self._go(way, proposals, seconds, seed, stop)
        )
        self._last[way] = float(cost.sum())
        better = cost < self.cost * (1 - 1e-12)
        self.cost = np.where(better, cost, self.cost)
        found = found[:, : self.problem.num_experts]
        self.rank_of = np.where(better[:, None], found, self.rank_of)

    def ways(self) -> list[Way]:
        """Those that make sense for the problem."""
        topology = self.problem.topology
        nested = topology.num_nodes > 1 and topology.ranks_per_node > 1
        return [Way.RANKS, Way.NODES] if nested and self.stay is None else [Way.RANKS]

    def _go(
        self,
        way: Way,
        proposals: int,
        seconds: float,
        seed: int,
        stop: NDArray[np.int32],
    ) -> tuple[RankOf, Floats]:
        if way is Way.RANKS:
            return self.anneal(self._members, proposals, seconds, seed, stop)
        start = self._find_nodes(proposals, seconds / 2, seed, stop)
        temperatures = {"hot": WARM, "cold": COOL}
        return self.anneal(start, proposals, seconds / 2, seed, stop, **temperatures)

    def anneal(
        self,
        start: RankOf,
        proposals: int,
        seconds: float,
        seed: int,
        stop: NDArray[np.int32],
        *,
        hot: float = HOT,
        cold: float = COLD,
    ) -> tuple[RankOf, Floats]:
        """Ranks of `members` after annealing, [L, P], and search costs, [L]."""
        options = self._search_options(proposals, seconds, seed, hot, cold)
        return _core.search_layers(self._search, options, start, stop)

    def _search_options(
        self, proposals: int, seconds: float, seed: int, hot: float, cold: float
    ) -> _core.SearchOptions:
        """Rounds after the ways are settled fill their time: no longer one comes."""
        return search_options(
            *(self.options, proposals, seconds, seed),
            hot=hot,
            cold=cold,
            fills_time=self._settled,
        )

    def _find_nodes(
        self, proposals: int, seconds: float, seed: int, stop: NDArray[np.int32]
    ) -> RankOf:
        """Ranks of `members` [L, P]: annealed over nodes, balanced inside them."""
        per_node = self.problem.topology.ranks_per_node
        nodes, _ = _core.search_layers(
            self._problem(nodes_alone=True),
            self._search_options(proposals, seconds, seed, HOT, COLD),
            self._members // per_node,
            stop,
        )
        load = np.zeros(nodes.shape)
        load[:, : self.problem.num_experts] = self.problem.statistics.load
        return _balance_inside(nodes, load, per_node, self.problem.slots_per_rank)

    def _problem(self, *, nodes_alone: bool = False) -> _core.SearchProblem:
        home, per_node = self._home, self.problem.topology.ranks_per_node
        if nodes_alone and home is not None:
            home = home // per_node
        keeps = self.stay is not None and not nodes_alone
        return search_problem(
            self.problem,
            self._scenarios,
            self.profile,
            home=home,
            stay=self.stay.rank_of() if keeps and self.stay else None,
            move_seconds=self.move_seconds if keeps else 0.0,
            nodes_alone=nodes_alone,
        )


def search_options(
    options: SolverOptions,
    proposals: int,
    seconds: float,
    seed: int,
    *,
    hot: float,
    cold: float,
    sweeps: int = 1,
    fills_time: bool = False,
) -> _core.SearchOptions:
    """The core's options for one search."""
    return _core.SearchOptions(
        proposals=proposals,
        sweeps=sweeps,
        start_temperature=hot,
        end_temperature=cold,
        seed=seed,
        num_threads=options.threads,
        seconds=seconds,
        fills_time=fills_time,
    )


def _balance_inside(
    nodes: RankOf, load: NDArray[Any], per_node: int, slots: int
) -> RankOf:
    """Ranks [L, P] of members on given nodes, by load inside each node."""
    rank_of = np.empty_like(nodes)
    for layer, (node_of, rows) in enumerate(zip(nodes, load, strict=True)):
        for node in range(int(node_of.max()) + 1):
            own = np.flatnonzero(node_of == node)
            rows_here = np.ascontiguousarray(rows[own], np.float64)
            packed = _core.pack_by_load(rows_here, per_node, slots)
            packed = _core.refine_by_swaps(rows_here, packed, per_node)
            rank_of[layer, own] = node * per_node + packed
    return rank_of
