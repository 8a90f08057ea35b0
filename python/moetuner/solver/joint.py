"""The joint planner: load, copies and links of every batch at once.

Annealed swaps in the C++ core, with exact changes of the modelled time of sampled
batches. Uniform homes leave layers independent: each is searched for itself, on all
cores. Where homes follow or are recorded, or slots can be spared for replicas, a second
phase walks the tokens through all layers. See ``docs/planning.md``.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

import numpy as np

import moetuner._core as _core
from moetuner.cost import Homes, Wire
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
from moetuner.solver.token_rounds import TokenRounds, spread_replicas
from moetuner.trace import CountTrace

if TYPE_CHECKING:
    from collections.abc import Callable

    from numpy.typing import NDArray

    from moetuner.placement import Placement
    from moetuner.problem import PlacementProblem

    RankOf = NDArray[np.int32]

FIRST_PROPOSALS = 1_000
"""Proposals per layer of the first round; every later round has twice as many."""
HOT, COLD = 1.0, 0.02
"""Temperatures, in units of the median |change| of a random swap."""
FIRST_MOVES = 250
"""The same of the walk along tokens, which starts from what is good already."""
WARM, COOL = 0.1, 0.01
LAYERED_SHARE = 0.35
"""Share of the time for layers by themselves where tokens are walked afterwards."""


@dataclass(frozen=True, kw_only=True, slots=True)
class JointConfig:
    """Options of `JointSolver` alone.

    Parameters
    ----------
    profile
        What is searched for beside the time; the default `SearchProfile` when None.
    rounds
        Rounds of annealing in each phase; 0 lets the clock decide, and only then can a
        slower machine find something else.
    patience
        End a phase after so many rounds that improved nothing.
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
        run = _Run(
            config=self.config,
            problem=problem,
            options=options,
            progress=progress,
            clock=Clock(time_limit=options.time_limit),
        )
        for rank_of in start_ranks(problem):
            run.incumbent.offer(place_or_none(problem, rank_of))
        status = SolveStatus.HEURISTIC
        if problem.topology.num_ranks > 1 and problem.statistics.load.any():
            status = run.search()
        return finish(
            self,
            problem,
            run.incumbent.placement,
            run.clock,
            status=SolveStatus.INTERRUPTED if run.runner.interrupted else status,
            warm_start=warm_start,
        )


@dataclass(kw_only=True)
class Incumbent:
    """The best placement so far, by the problem's own objective."""

    problem: PlacementProblem
    placement: Placement = field(init=False)
    value: float = np.inf

    def offer(self, placement: Placement | None) -> bool:
        """Take `placement` when there is one and it is better."""
        if placement is None:
            return False
        value = self.problem.objective_value(placement)
        if value >= self.value:
            return False
        self.placement, self.value = placement, value
        return True


def place_or_none(problem: PlacementProblem, rank_of: RankOf) -> Placement | None:
    """The placement of `rank_of` [L, E] when it answers the problem."""
    try:
        placement = place(problem, rank_of)
        problem.check(placement)
    except InvalidPlacementError:
        return None
    return placement


@dataclass(kw_only=True)
class _Run:
    """One solve: first layer by layer, then along the tokens where that matters."""

    config: JointConfig
    problem: PlacementProblem
    options: SolverOptions
    progress: ProgressCallback | None
    clock: Clock
    runner: Interruptible = field(default_factory=Interruptible)
    incumbent: Incumbent = field(init=False)
    status: SolveStatus = SolveStatus.HEURISTIC

    def __post_init__(self) -> None:
        self.incumbent = Incumbent(problem=self.problem)

    def search(self) -> SolveStatus:
        """Both phases; the status says what ended the last one."""
        profile = self.config.profile or SearchProfile()
        balanced = balanced_rank_of(replace(self.problem, equal_slots=True))
        layers = LayerRounds(
            problem=self.problem,
            options=self.options,
            profile=profile,
            start=balanced,
            runner=self.runner,
        )
        walk = self._must_walk()

        def anneal(proposals: int, seconds: float) -> bool:
            better = layers.round(proposals, seconds)
            if better:
                self.incumbent.offer(place_or_none(self.problem, layers.rank_of))
            return better

        share = LAYERED_SHARE if walk else 1.0
        status = self._rounds("layers", FIRST_PROPOSALS, share, anneal)
        if not walk or self.runner.interrupted:
            return status
        tokens = TokenRounds(
            problem=self.problem,
            options=self.options,
            profile=profile,
            runner=self.runner,
            replicas=self._has_spare_slots(),
        )
        self._offer_walks(tokens, layers.rank_of)

        def walk_tokens(proposals: int, seconds: float) -> bool:
            found = tokens.round(
                self.incumbent.placement, proposals, seconds, hot=WARM, cold=COOL
            )
            return self.incumbent.offer(found)

        return self._rounds("tokens", FIRST_MOVES, 1.0, walk_tokens)

    def _must_walk(self) -> bool:
        """Whether layers or homes matter, or there is room for replicas."""
        workload = self.problem.workload
        assert workload is not None
        if any(isinstance(trace, CountTrace) for trace in workload.traces):
            return False
        homes = workload.cost.homes is not Homes.UNIFORM
        moves = workload.cost.wire is not Wire.ALLGATHER
        return (homes and moves) or self._has_spare_slots()

    def _has_spare_slots(self) -> bool:
        """Whether ranks were given more slots than the experts need."""
        problem = self.problem
        enough = -(-problem.num_experts // problem.topology.num_ranks)
        return problem.equal_slots and problem.slots_per_rank > enough

    def _offer_walks(self, tokens: TokenRounds, rank_of: RankOf) -> None:
        """Layers lined up where homes follow, and copies in the spare slots."""
        workload = self.problem.workload
        assert workload is not None
        if workload.cost.homes is Homes.FOLLOW:
            for ranks in (rank_of, balanced_rank_of(self.problem)):
                aligned = tokens.align(ranks)
                self.incumbent.offer(place_or_none(self.problem, aligned))
        if tokens.replicas:
            filled = spread_replicas(self.problem, self.incumbent.placement)
            self.incumbent.offer(filled)

    def _rounds(
        self,
        stage: str,
        proposals: int,
        share: float,
        anneal: Callable[[int, float], bool],
    ) -> SolveStatus:
        """Rounds of twice the length each, as long as the next one fits."""
        idle = done = 0
        end = self.clock.seconds + share * self.clock.left
        while idle < self.config.patience:
            if self.config.rounds and done >= self.config.rounds:
                break
            began = self.clock.seconds
            if began >= end:
                return SolveStatus.TIME_LIMIT
            better = anneal(proposals, end - began)
            done, idle = done + 1, 0 if better else idle + 1
            if self.progress:
                self.progress(
                    ProgressEvent(
                        solver="joint",
                        stage=stage,
                        done=done,
                        total=self.config.rounds or done + 1,
                        incumbent=self.incumbent.value,
                        seconds=self.clock.seconds,
                    )
                )
            if self.runner.interrupted:
                return SolveStatus.INTERRUPTED
            took, left = self.clock.seconds - began, end - self.clock.seconds
            if self.config.rounds or 2 * took <= left:
                proposals *= 2
            elif took > left:
                return SolveStatus.TIME_LIMIT
        return SolveStatus.HEURISTIC


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
