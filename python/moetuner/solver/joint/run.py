"""One solve of the joint planner: its stages, and what each gets of the time.

First layer by layer, then layers together or along the tokens where that matters. With
spare slots first the plan with fewer of them: more are never worse.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

from moetuner._core import Rows
from moetuner.evaluation.cost import Homes
from moetuner.solver.base import (
    Clock,
    ProgressCallback,
    ProgressEvent,
    SolverOptions,
    SolveStatus,
    Stage,
    place,
)
from moetuner.solver.heuristics.lpt import balanced_rank_of
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
from moetuner.solver.joint.replica_trial import Trial, try_replicas
from moetuner.solver.joint.replicas import (
    cheapest_layers,
    filled,
    spread_replicas,
    without_spare,
)
from moetuner.solver.joint.schedule import Rounds, Schedule
from moetuner.solver.joint.small_layers import finish_small_layers, has_kernel
from moetuner.solver.joint.tokens import TokenRounds

if TYPE_CHECKING:
    from collections.abc import Callable

    from moetuner.evaluation.cost import CostModel
    from moetuner.placement.model import Placement
    from moetuner.problem import PlacementProblem
    from moetuner.solver.base import Solution
    from moetuner.solver.joint.config import JointConfig
    from moetuner.solver.joint.scenarios import SearchProfile

    SolveFewer = Callable[
        [PlacementProblem, SolverOptions, JointConfig, Placement | None], Solution
    ]

FIRST_PROPOSALS = 1_000
"""Proposals per layer of the first round; others have `GROWTH` times more."""
FIRST_MOVES = 250
"""The same of the walk along tokens, which starts from what is good already."""
TRIAL_SHARE = 0.15
"""Share of the time for choosing a profile; where it is too little, none is chosen."""
REPLICA_TRIAL_SHARE = 0.1
"""The same for a look at what replicas gain."""
MIN_TRIAL_TIME = 8.0
"""Time limit in seconds below which none is tried, and no bound is counted."""
LAYERED_SHARE = 0.25
"""Share of the time for layers by themselves where they are searched together later."""
KERNEL_SHARE = 0.5
"""Share of the time for layers by themselves where exact methods come afterwards."""
FOLLOW_SHARE = 0.4
"""Share of what is left for layers together where tokens are walked afterwards."""
REPLICA_SHARE = 0.6
"""Share of the time for a plan without replicas where these pay: the rest is theirs."""
PAYING_GAIN = 0.004
"""What replicas must gain of a brief plan to get that time: a longer search's gain is
less, and as much is lost where the search without them is cut short."""
FILLS, FEW_FILLS = 10, 4
"""Valuations that all simple rules need, or some, and the end of a solve."""
CLOSING = 2.5
"""Those that the end alone needs."""
MIN_SECONDS = 1e-3
"""Of a solve that has no time: it returns what it begins with."""


@dataclass(kw_only=True)
class Run:
    """One solve: first layer by layer, then along the tokens where that matters."""

    config: JointConfig
    problem: PlacementProblem
    options: SolverOptions
    progress: ProgressCallback | None
    clock: Clock
    solve_fewer: SolveFewer
    """Solves the problem with fewer slots."""
    runner: Interruptible = field(default_factory=Interruptible)
    incumbent: Incumbent = field(init=False)
    stages: list[Stage] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.incumbent = Incumbent(
            problem=self.problem,
            stay=self.config.stay,
            move_seconds=self.config.move_seconds,
        )

    def keep_time_to_close(self) -> None:
        """What the last valuations need is no time to search in."""
        last = CLOSING * self.incumbent.longest
        self.clock.time_limit = max(self.options.time_limit - last, MIN_SECONDS)

    def search(self) -> SolveStatus:
        """Both phases; the status says what ended the last one."""
        profile = self.config.profile or self._choose_profile()
        stay = self.config.stay
        if stay is not None and stay.has_replicas:
            return self._refill(profile, stay)
        if stay is None and self.problem.wants_replicas:
            return self._add_replicas(profile)
        problem = self.problem
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
        if has_kernel(self.problem, self.config):
            share = KERNEL_SHARE
        status = self._rounds("layers", FIRST_PROPOSALS, share, layers)
        rank_of = layers.rank_of
        if follow and self._goes_on():
            best = self.incumbent.placement  # a warm start may have replicas
            together = FollowRounds(
                problem=problem,
                options=self.options,
                profile=profile,
                runner=self.runner,
                layered=rank_of,
                known=None if best.has_replicas else best.rank_of(),
            )
            self._prefer(together.placement)  # to line layers up may gain most
            share = FOLLOW_SHARE if walk else 1.0
            status = self._rounds("follow", FIRST_PROPOSALS, share, together)
            rank_of = together.rank_of
        if (
            stay is not None
            and self.problem.wants_replicas
            and not self.problem.workload.counted
        ):
            found = self.incumbent.placement
            self.offer_layers(found, spread_replicas(self.problem, found))
        if not walk or not self._goes_on():
            return status
        return self._walk(profile, [place(problem, rank_of), self.incumbent.placement])

    def _add_replicas(self, profile: SearchProfile) -> SolveStatus:
        """The plan with fewer slots first; then replicas where they pay, and a walk."""
        trial = None if self.config.rounds else self._try_replicas(profile)
        if not self._goes_on():
            return SolveStatus.TIME_LIMIT
        fewer = self._solve_fewer(profile, trial)
        self.stages.extend(fewer.stages)
        alike = not fewer.placement.has_replicas  # which one a token takes may change
        self.incumbent.prefer(fewer.placement, fewer.value if alike else None)
        if fewer.status is SolveStatus.INTERRUPTED:
            self.runner.stop[0] = 1
            return fewer.status
        if trial is not None and trial.is_futile:
            return fewer.status
        began = self.clock.seconds
        known = [fewer.placement, self.incumbent.placement]
        starts = filled(self.problem, known)
        if trial is not None and trial.found:  # single layers of it may be better
            plain, (tried, _) = widened(fewer.placement, self.problem), trial.found[-1]
            starts = itertools.chain([plain, tried], starts)
        if self.config.favour is not Favour.FEW_RANKS:
            best, *seen = cheapest_layers(self.problem, starts, self.clock)
            self.incumbent.offer(best)
            self._offer_tried(trial)
            self.incumbent.floor = self.incumbent.value  # never slower than without
            starts = iter(seen)
        self._add_stage("replicas", began)
        if self.problem.workload.counted or not self._goes_on():
            return fewer.status
        # Where there is no time to look at more than one it is what is held already.
        return self._walk(profile, [*starts, self.incumbent.placement])

    def _try_replicas(self, profile: SearchProfile) -> Trial | None:
        """What replicas gain of a brief plan, where there is time to look at it."""
        trial = try_replicas(
            *(self.problem, self.options, profile, self.runner),
            REPLICA_TRIAL_SHARE * self.clock.left,
            searches=self.options.time_limit >= MIN_TRIAL_TIME,
        )
        self._offer_tried(trial)
        return trial

    def _offer_tried(self, trial: Trial | None) -> None:
        for placement, value in () if trial is None else trial.found:
            self.incumbent.offer(placement, value)

    def _solve_fewer(self, profile: SearchProfile, trial: Trial | None) -> Solution:
        """The plan with no spare slots; by rounds, with one slot a rank less.

        Then more slots are never worse, for each number of them is searched on top of
        the one before.
        """
        config = self.config
        if config.favour is Favour.TIME:
            config = replace(config, profile=profile)
        if config.rounds:
            fewer = replace(
                self.problem, slots_per_rank=self.problem.slots_per_rank - 1
            )
            limited = replace(self.options, time_limit=self.clock.left)
            return self.solve_fewer(fewer, limited, config, None)
        fewer = without_spare(self.problem)
        limited = replace(self.options, time_limit=self._seconds_of_fewer(trial))
        start = None
        if config.favour is not Favour.FEW_RANKS:  # may cost more time than a start
            start = self._start_of_fewer(fewer)
        return self.solve_fewer(fewer, limited, config, start)

    def _seconds_of_fewer(self, trial: Trial | None) -> float:
        """All that is left, but for what replicas need: it ends as any solve does."""
        seconds = max(self.options.time_limit - self.clock.seconds, MIN_SECONDS)
        if trial is not None and trial.is_futile:
            return seconds
        pays = trial is not None and trial.gain > PAYING_GAIN
        share = REPLICA_SHARE if pays and not self.problem.workload.counted else 1.0
        each = self.incumbent.longest
        if trial is not None:  # to make them takes time too
            each = max(each, trial.fill_seconds)
        after = (FILLS if pays else FEW_FILLS) * each
        least = max(0.5 * self.clock.left, MIN_SECONDS)
        return max(min(share * seconds, seconds - after), least)

    def _start_of_fewer(self, fewer: PlacementProblem) -> Placement:
        """The best that is known, where its slots do; else what is balanced."""
        best = self.incumbent.placement
        if best.has_replicas or best.rank_sizes().max() > fewer.slots_per_rank:
            return place(fewer, balanced_rank_of(fewer))
        return widened(best, fewer)

    def _walk(self, profile: SearchProfile, starts: list[Placement]) -> SolveStatus:
        """Walk tokens from the best of the starts."""
        tokens = self._token_rounds(profile, replicas=self.problem.wants_replicas)
        tokens.begin(starts, self.clock)
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
        self.offer_layers(stay, filled)
        tokens.begin([filled], self.clock)
        status = self._rounds("tokens", FIRST_MOVES, 1.0, tokens)
        self.offer_layers(stay, tokens.placement)
        return status

    def _token_rounds(self, profile: SearchProfile, *, replicas: bool) -> TokenRounds:
        return TokenRounds(
            problem=self.problem,
            options=self.options,
            profile=profile,
            runner=self.runner,
            replicas=replicas,
        )

    def offer_layers(self, base: Placement, other: Placement) -> None:
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
            without_spare(self.problem), self.options, self.runner, self.clock, seconds
        )
        self._add_stage("choice of a profile", began)
        return profile

    def _goes_on(self) -> bool:
        return not self.runner.interrupted and self.clock.left > 0

    def _add_stage(self, name: str, began: float) -> None:
        self.keep_time_to_close()
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
        """Whether homes matter to each row by itself."""
        cost = self._cost()
        rules = cost.wire.rules
        moves = rules.rows is not Rows.TO_ALL and not rules.once_per_place
        alone = cost.homes is not Homes.UNIFORM and moves
        return alone and self._may_walk()

    def _may_walk(self) -> bool:
        """Whether tokens are known, and layers may be lined up anew."""
        # Else everything would move.
        return not self.problem.workload.counted and self.config.stay is None

    def _cost(self) -> CostModel:
        return self.problem.workload.cost

    def _prefer(self, placement: Placement) -> None:
        """Take what a search prefers, if its value is there in time."""
        incumbent = self.incumbent
        value = self.runner.in_time(lambda: incumbent.value_of(placement))
        if value is not None:
            incumbent.prefer(placement, value)

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
                self._prefer(rounds.placement)
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
