"""Rounds of annealing, every layer for itself: what uniform homes allow.

Legend: L layers, E experts, G ranks, P slots.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np

import moetuner._core as _core
from moetuner.cost import Wire
from moetuner.solver.scenarios import (
    Scenarios,
    SearchProfile,
    make_scenarios,
    members,
    search_weights,
)

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from moetuner.placement import Placement
    from moetuner.problem import PlacementProblem
    from moetuner.solver.background import Interruptible
    from moetuner.solver.base import SolverOptions

    RankOf = NDArray[np.int32]

HOT, COLD = 1.0, 0.02
"""Temperatures, in units of the median |change| of a random swap."""


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
    cost: NDArray[np.float64] = field(init=False)
    _members: RankOf = field(init=False)
    _scenarios: Scenarios = field(init=False)
    _rounds: int = 0

    def __post_init__(self) -> None:
        workload = self.problem.workload
        assert workload is not None
        self._scenarios = make_scenarios(workload, self.profile.scenario_tokens)
        self._members = members(self.problem, self.start)
        self.rank_of = self.start
        self.cost = np.full(self.problem.num_layers, np.inf)

    def round(self, proposals: int, seconds: float) -> bool:
        """Anneal all layers from the start; whether any of them is better now."""
        self._rounds += 1
        seed = self.options.seed * 1_000_003 + self._rounds

        found, cost = self.runner.run(
            lambda stop: self.anneal(self._members, proposals, seconds, seed, stop)
        )
        better = cost < self.cost * (1 - 1e-12)
        self.cost = np.where(better, cost, self.cost)
        found = found[:, : self.problem.num_experts]
        self.rank_of = np.where(better[:, None], found, self.rank_of)
        return bool(better.any())

    def anneal(
        self,
        start: RankOf,
        proposals: int,
        seconds: float,
        seed: int,
        stop: NDArray[np.int32],
    ) -> tuple[RankOf, NDArray[np.float64]]:
        """Ranks of `members` after annealing, [L, P], and search costs, [L]."""
        problem, scenarios = self.problem, self._scenarios
        workload = problem.workload
        assert workload is not None
        topology, wire = problem.topology, workload.cost.wire
        speeds = workload.cost.rank_speeds or (1.0,) * topology.num_ranks
        found: tuple[RankOf, NDArray[np.float64]] = _core.search_layers(
            scenarios.topk_ids,
            scenarios.begin,
            scenarios.load,
            scenarios.active,
            scenarios.row_scale,
            scenarios.weight,
            np.array(speeds, np.float64),
            search_weights(problem, self.profile),
            topology.ranks_per_node,
            wire is Wire.DEDUP,
            wire is Wire.ALLGATHER,
            None if self.stay is None else self.stay.rank_of(),
            self.move_seconds,
            start,
            proposals,
            HOT,
            COLD,
            seed,
            self.options.threads,
            seconds,
            stop,
        )
        return found
