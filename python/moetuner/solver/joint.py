"""The joint planner: load, copies and links of every batch at once.

Annealed swaps in the C++ core, with exact changes of the modelled time of sampled
batches. Homes that do not follow the routing leave layers independent: each is searched
for itself, on all cores. See ``docs/planning.md``.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

import numpy as np

import moetuner._core as _core
from moetuner.cost import Wire
from moetuner.errors import InvalidPlacementError
from moetuner.placement import contiguous_rank_of
from moetuner.problem import Objective
from moetuner.solver.background import Interruptible
from moetuner.solver.base import (
    Clock,
    ProgressCallback,
    ProgressEvent,
    Solution,
    SolverOptions,
    SolveStatus,
    check_objective,
    finish,
    place,
)
from moetuner.solver.chain import align_layers
from moetuner.solver.lpt import balanced_rank_of
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

    RankOf = NDArray[np.int32]

FIRST_PROPOSALS = 1_000
"""Proposals per layer of the first round; every later round has twice as many."""
HOT, COLD = 1.0, 0.02
"""Temperatures, in units of the median |change| of a random swap."""


@dataclass(frozen=True, kw_only=True, slots=True)
class JointConfig:
    """Options of `JointSolver` alone.

    Parameters
    ----------
    profile
        What is searched for beside the time; the default `SearchProfile` when None.
    rounds
        Rounds of annealing; 0 lets the clock decide, and only then can a slower machine
        find something else.
    patience
        Stop after so many rounds that improved no layer.
    """

    profile: SearchProfile | None = None
    rounds: int = 0
    patience: int = 6


@dataclass(frozen=True, kw_only=True, slots=True)
class JointSolver:
    """Annealed swaps on sampled batches; never worse than LPT, chain or contiguous."""

    config: JointConfig = JointConfig()
    name: str = "joint"
    objectives: tuple[Objective, ...] = (Objective.MODELLED_TIME,)

    def solve(
        self,
        problem: PlacementProblem,
        options: SolverOptions = SolverOptions(),
        *,
        warm_start: Placement | None = None,
        progress: ProgressCallback | None = None,
    ) -> Solution:
        """See `moetuner.solver.Solver`."""
        check_objective(self, problem)
        clock = Clock(time_limit=options.time_limit)
        incumbent = Incumbent(problem=problem)
        for rank_of in start_ranks(problem):
            incumbent.offer(rank_of)
        runner = Interruptible()
        status = SolveStatus.HEURISTIC
        if problem.topology.num_ranks > 1 and problem.statistics.load.any():
            search = LayerRounds(
                problem=problem,
                options=options,
                profile=self.config.profile or SearchProfile(),
                start=balanced_rank_of(replace(problem, equal_slots=True)),
                runner=runner,
            )
            status = self._search(search, incumbent, clock, progress)
        if runner.interrupted:
            status = SolveStatus.INTERRUPTED
        return finish(
            self,
            problem,
            incumbent.rank_of,
            clock,
            status=status,
            warm_start=warm_start,
        )

    def _search(
        self,
        search: LayerRounds,
        incumbent: Incumbent,
        clock: Clock,
        progress: ProgressCallback | None,
    ) -> SolveStatus:
        """Rounds of twice the length each, as long as the next one fits."""
        proposals, idle, done = FIRST_PROPOSALS, 0, 0
        while idle < self.config.patience:
            if self.config.rounds and done >= self.config.rounds:
                break
            began = clock.seconds
            better = search.round(proposals, clock.left)
            if better:
                incumbent.offer(search.rank_of)
            done, idle = done + 1, 0 if better else idle + 1
            if progress:
                progress(
                    ProgressEvent(
                        solver=self.name,
                        stage="joint",
                        done=done,
                        total=self.config.rounds or done + 1,
                        incumbent=incumbent.value,
                        seconds=clock.seconds,
                    )
                )
            took = clock.seconds - began
            if search.runner.interrupted:
                return SolveStatus.INTERRUPTED
            if self.config.rounds or 2 * took <= clock.left:
                proposals *= 2
            elif took > clock.left:
                return SolveStatus.TIME_LIMIT
        return SolveStatus.HEURISTIC


@dataclass(kw_only=True)
class Incumbent:
    """The best placement so far, by the problem's own objective."""

    problem: PlacementProblem
    rank_of: RankOf = field(init=False)
    value: float = np.inf

    def offer(self, rank_of: RankOf) -> bool:
        """Take `rank_of` when it is legal and better."""
        try:
            value = self.problem.objective_value(place(self.problem, rank_of))
        except InvalidPlacementError:
            return False
        if value >= self.value:
            return False
        self.rank_of, self.value = rank_of, value
        return True


def start_ranks(problem: PlacementProblem) -> list[RankOf]:
    """Ranks [L, E] of the quick methods; the first one is always legal."""
    topology = problem.topology
    balanced = balanced_rank_of(replace(problem, objective=Objective.MAX_LOAD))
    blocks = contiguous_rank_of(
        problem.num_layers, problem.num_experts, topology.num_ranks
    )
    starts = [balanced, blocks]
    if problem.statistics.transitions is not None:
        asked = replace(problem, objective=Objective.LINK_TRAFFIC)
        starts.append(align_layers(asked, balanced))
    return starts


@dataclass(kw_only=True)
class LayerRounds:
    """Annealing of every layer for itself; the best of each layer is kept."""

    problem: PlacementProblem
    options: SolverOptions
    profile: SearchProfile
    start: RankOf
    runner: Interruptible
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
