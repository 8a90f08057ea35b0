"""The joint planner: load, copies and links of every batch at once.

Annealed swaps in the C++ core, with exact changes of the modelled time of sampled
batches. Uniform homes leave layers independent: each is searched for itself, on all
cores. Where homes follow or are recorded, or slots can be spared for replicas, a second
phase walks the tokens through all layers. See ``docs/planning.md``.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

from moetuner._core import Rows
from moetuner.bounds import counting_bound
from moetuner.evaluation.cost import Homes
from moetuner.problem import Objective
from moetuner.solver.base import (
    Clock,
    ProgressCallback,
    ProgressEvent,
    Solution,
    SolverOptions,
    SolveStatus,
    Stage,
    check_objective,
    finish,
    place,
)
from moetuner.solver.heuristics.lpt import balanced_rank_of
from moetuner.solver.heuristics.starts import quick_placements
from moetuner.solver.joint.config import JointConfig
from moetuner.solver.joint.follow import FollowRounds
from moetuner.solver.joint.incumbent import Incumbent
from moetuner.solver.joint.interruptible import Interruptible
from moetuner.solver.joint.layers import LayerRounds
from moetuner.solver.joint.profiles import (
    TIME_PROFILES,
    TRACE_PROFILE,
    Favour,
    choose_profile,
    few_ranks_profile,
)
from moetuner.solver.joint.replan import layers_that_pay, widened
from moetuner.solver.joint.replicas import cheapest_layers, filled, spread_replicas
from moetuner.solver.joint.schedule import Rounds, Schedule
from moetuner.solver.joint.small_layers import finish_small_layers, has_kernel
from moetuner.solver.joint.tokens import TokenRounds
from moetuner.solver.joint.worst_case import solve_worst_case
from moetuner.trace import CountTrace

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from moetuner.evaluation.cost import CostModel
    from moetuner.placement.model import Placement
    from moetuner.problem import PlacementProblem
    from moetuner.solver.joint.scenarios import SearchProfile

    RankOf = NDArray[np.int32]

__all__ = ["JointConfig", "JointSolver"]

FIRST_PROPOSALS = 1_000
"""Proposals per layer of the first round; others have `GROWTH` times more."""
FIRST_MOVES = 250
"""The same of the walk along tokens, which starts from what is good already."""
TRIAL_SHARE = 0.15
"""Share of the time for choosing a profile; where it is too little, none is chosen."""
MIN_TRIAL_TIME = 10.0
"""Time limit in seconds below which none is tried, and no bound is counted."""
LAYERED_SHARE = 0.25
"""Share of the time for layers by themselves where they are searched together later."""
REPLICA_SHARE = 0.6
"""The same where tokens are walked for replicas alone: they seldom gain more."""
KERNEL_SHARE = 0.5
"""Share of the time for layers by themselves where exact methods come afterwards."""
FOLLOW_SHARE = 0.4
"""Share of what is left for layers together where tokens are walked afterwards."""


@dataclass(frozen=True, kw_only=True, slots=True)
class JointSolver:
    """Annealed swaps on sampled batches; never slower than LPT, chain or contiguous.

    Unless few ranks per token are favoured.
    """

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
        workload = problem.workload
        if workload.takes_slowest:
            return solve_worst_case(
                self,
                problem,
                options,
                starts=self._floors(problem),
                value_of=Incumbent(
                    problem=problem,
                    stay=self.config.stay,
                    move_seconds=self.config.move_seconds,
                ).value_of,
                warm_start=warm_start,
                progress=progress,
            )
        run = _Run(
            config=self.config,
            problem=problem,
            options=options,
            progress=progress,
            clock=Clock(time_limit=options.time_limit),
        )
        if self.config.stay is not None:
            problem.check(self.config.stay)
            run.incumbent.offer(self.config.stay)
        else:
            for placement in quick_placements(problem):
                run.incumbent.offer(placement)
        if self.config.favour is not Favour.FEW_RANKS:  # few of them may well cost time
            run.incumbent.floor = run.incumbent.value
        status = SolveStatus.HEURISTIC
        try:
            run.incumbent.bound = self._bound(problem, options)
            if problem.topology.num_ranks > 1 and problem.statistics.load.any():
                status = run.search()
                run.try_small_layers()
        except KeyboardInterrupt:  # between two calls into the core
            run.runner.stop[0] = 1

        def close() -> Solution:
            return finish(
                self,
                problem,
                widened(run.incumbent.placement, problem),
                run.clock,
                status=SolveStatus.INTERRUPTED if run.runner.interrupted else status,
                lower_bound=run.incumbent.bound,
                stages=tuple(run.stages),
                warm_start=warm_start,
            )

        try:
            return close()
        except KeyboardInterrupt:  # while the last value is told
            run.runner.stop[0] = 1
            return close()

    def _floors(self, problem: PlacementProblem) -> list[Placement]:
        """What no plan may be slower than: few ranks may well cost time."""
        if self.config.favour is Favour.FEW_RANKS:
            return []
        stay = self.config.stay
        return quick_placements(problem) if stay is None else [stay]

    def _bound(self, problem: PlacementProblem, options: SolverOptions) -> float | None:
        """What counting proves, where there is time for it."""
        if options.time_limit < MIN_TRIAL_TIME:
            return None
        return counting_bound(problem)


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
    stages: list[Stage] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.incumbent = Incumbent(
            problem=self.problem,
            stay=self.config.stay,
            move_seconds=self.config.move_seconds,
        )

    def search(self) -> SolveStatus:
        """Both phases; the status says what ended the last one."""
        profile = self.config.profile or self._choose_profile()
        stay = self.config.stay
        if stay is not None and stay.has_replicas:
            return self._refill(profile, stay)
        # With spare slots, first the plan without them: more are never worse.
        problem = self.problem
        if stay is None and problem.wants_replicas:
            problem = replace(problem, slots_per_rank=problem.min_slots)
        balanced = balanced_rank_of(problem)
        layers = LayerRounds(
            problem=problem,
            options=self.options,
            profile=profile,
            start=balanced if stay is None else stay.rank_of(),
            runner=self.runner,
            stay=stay,
            move_seconds=self.config.move_seconds,
        )
        walk, follow = self._must_walk(), self._follows()
        share = LAYERED_SHARE if walk or follow else 1.0
        if walk and not follow and self._cost().homes is Homes.UNIFORM:
            share = REPLICA_SHARE
        if has_kernel(self.problem, self.config):
            share = KERNEL_SHARE
        status = self._rounds("layers", FIRST_PROPOSALS, share, layers)
        rank_of = layers.rank_of
        if follow and self._goes_on():
            together = FollowRounds(
                problem=problem,
                options=self.options,
                profile=profile,
                runner=self.runner,
                layered=rank_of,
            )
            share = FOLLOW_SHARE if walk else 1.0
            status = self._rounds("follow", FIRST_PROPOSALS, share, together)
            rank_of = together.rank_of
        if stay is not None and self.problem.wants_replicas and not self._counted():
            found = self.incumbent.placement
            self._offer_layers(found, spread_replicas(self.problem, found))
        starts = [place(self.problem, rank_of), self.incumbent.placement]
        if stay is None and self.problem.wants_replicas:
            starts = filled(self.problem, starts)
            if self.config.favour is not Favour.FEW_RANKS:
                best = cheapest_layers(self.problem, starts, self.clock)
                self.incumbent.offer(best)
                starts.append(self.incumbent.placement)
        if not walk or not self._goes_on():
            return status
        tokens = self._token_rounds(profile, replicas=self.problem.wants_replicas)
        if tokens.replicas and self.config.favour is not Favour.FEW_RANKS:
            self.incumbent.floor = self.incumbent.value  # never slower than without
        tokens.begin(starts)
        self.incumbent.prefer(tokens.placement)
        return self._rounds("tokens", FIRST_MOVES, 1.0, tokens)

    def try_small_layers(self) -> None:
        """Exact methods for few experts, as a stage."""
        began = self.clock.seconds
        if self.config.favour is Favour.FEW_RANKS or not self._goes_on():
            return
        if finish_small_layers(
            self.incumbent, self.config, self.options, self.clock, self.runner
        ):
            self._add_stage("small layers", began)

    def _refill(self, profile: SearchProfile, stay: Placement) -> SolveStatus:
        """Walk tokens from a placement in use with replicas; take what pays."""
        tokens = self._token_rounds(profile, replicas=True)
        filled = spread_replicas(self.problem, widened(stay, self.problem))
        self._offer_layers(stay, filled)
        tokens.begin([filled])
        status = self._rounds("tokens", FIRST_MOVES, 1.0, tokens)
        self._offer_layers(stay, tokens.placement)
        return status

    def _token_rounds(self, profile: SearchProfile, *, replicas: bool) -> TokenRounds:
        return TokenRounds(
            problem=self.problem,
            options=self.options,
            profile=profile,
            runner=self.runner,
            replicas=replicas,
        )

    def _offer_layers(self, base: Placement, other: Placement) -> None:
        """Take `base` with the layers of `other` whose moves pay."""
        stay, moved = self.config.stay, self.config.move_seconds
        assert stay is not None
        self.incumbent.offer(
            layers_that_pay(self.problem, base, other, stay=stay, move_seconds=moved)
        )

    def _choose_profile(self) -> SearchProfile:
        config, began = self.config, self.clock.seconds
        if config.favour is Favour.FEW_RANKS:
            return few_ranks_profile(config.rank_weight)
        if config.favour is Favour.TRACE:
            return TRACE_PROFILE
        seconds = TRIAL_SHARE * self.clock.left
        if config.rounds:
            seconds = float("inf")  # not for the clock to decide
        elif self.options.time_limit < MIN_TRIAL_TIME:
            return TIME_PROFILES[0]
        profile = choose_profile(
            self.problem, self.options, self.runner, self.clock, seconds
        )
        self._add_stage("choice of a profile", began)
        return profile

    def _goes_on(self) -> bool:
        return not self.runner.interrupted and self.clock.left > 0

    def _add_stage(self, name: str, began: float) -> None:
        self.stages.append(
            Stage(
                name=name,
                objective=self.problem.objective,
                value=self.incumbent.value,
                lower_bound=self.incumbent.bound,
                status=SolveStatus.HEURISTIC,
                seconds=self.clock.seconds - began,
            )
        )

    def _follows(self) -> bool:
        """Whether layers matter to each other, searched as sets of tokens."""
        cost = self._cost()
        follow = cost.homes is Homes.FOLLOW and cost.wire.rules.once_per_place
        return follow and self._may_walk()

    def _must_walk(self) -> bool:
        """Whether there is room for replicas, or homes matter to each row by itself."""
        cost = self._cost()
        rules = cost.wire.rules
        moves = rules.rows is not Rows.TO_ALL and not rules.once_per_place
        alone = cost.homes is not Homes.UNIFORM and moves
        return (alone or self.problem.wants_replicas) and self._may_walk()

    def _may_walk(self) -> bool:
        """Whether tokens are known, and layers may be lined up anew."""
        # Else everything would move.
        return not self._counted() and self.config.stay is None

    def _counted(self) -> bool:
        """Whether a source only counted: nobody knows which replica a token takes."""
        workload = self.problem.workload
        return any(isinstance(trace, CountTrace) for trace in workload.traces)

    def _cost(self) -> CostModel:
        return self.problem.workload.cost

    def _rounds(
        self,
        stage: str,
        proposals: int,
        share: float,
        rounds: Rounds,
    ) -> SolveStatus:
        """A stage of rounds, the first of that many proposals; its status."""

        def report(done: int, better: bool) -> None:
            if better:
                self.incumbent.prefer(rounds.placement)
            if self.progress:
                self.progress(
                    ProgressEvent(
                        solver="joint",
                        stage=stage,
                        done=done,
                        total=self.config.rounds or done + 1,
                        incumbent=self.incumbent.value,
                        bound=self.incumbent.bound,
                        seconds=self.clock.seconds,
                    )
                )

        schedule = Schedule(
            clock=self.clock,
            runner=self.runner,
            max_rounds=self.config.rounds,
            patience=self.config.patience,
            report=report,
        )
        began = self.clock.seconds
        status = schedule.run(rounds, proposals, share)
        self._add_stage(stage, began)
        return status
