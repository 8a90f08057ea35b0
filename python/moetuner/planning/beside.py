"""What stands beside a plan: baselines, solved and scored in their part of its time.

One clock is for all: baselines come first, the solver gets what is left of the limit
but for the time that its own scores will take, as theirs did.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

import numpy as np

from moetuner.planning.baselines import (
    BASELINE_SHARE,
    BASELINES,
    IN_USE,
    LEAST_SECONDS,
    QUICK,
    SLOW,
    baseline_names,
    solve_baselines,
)
from moetuner.planning.held_layers import held_layers
from moetuner.planning.progress import History
from moetuner.planning.provenance import with_source
from moetuner.planning.recordings import workload_of
from moetuner.planning.scores import measure
from moetuner.problem import Objective, PlacementProblem
from moetuner.solver import get_solver
from moetuner.solver.base import (
    Clock,
    ProgressEvent,
    SolveStatus,
    Stage,
    finish,
    interrupted,
)
from moetuner.solver.joint.incumbent import Incumbent
from moetuner.solver.joint.profiles import Favour
from moetuner.solver.joint.replicas import (
    best_layers,
    is_sum_of_layers,
    layer_costs,
)

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

    from moetuner.placement.model import Placement
    from moetuner.placement.topology import Topology
    from moetuner.planning.baselines import Baselines
    from moetuner.planning.options import PlanOptions
    from moetuner.planning.recordings import Recording
    from moetuner.planning.scores import Measured
    from moetuner.solver.base import ProgressCallback, Solution, SolverOptions

SCORE_MARGIN = 1.2
"""Of the longest scoring so far, what is kept for that of the result."""
MIN_SOLVER_SECONDS = 1e-3
"""A solver that has no time left returns what it begins with."""


@dataclass(kw_only=True)
class Beside:
    """Baselines of a plan with their scores, and the clock that they share with it."""

    problem: PlacementProblem
    recordings: Sequence[Recording]
    options: PlanOptions
    clock: Clock
    """Of the whole plan."""
    progress: ProgressCallback | None = None
    solutions: dict[str, Solution] = field(default_factory=dict)
    left_out: dict[str, str] = field(default_factory=dict)
    measured: list[dict[str, Measured]] = field(default_factory=list)
    """Scores on each recording, by name."""
    interrupted: bool = False
    _score_seconds: float = 0.0
    _value_seconds: float = 0.0
    _costs: dict[str, NDArray[np.float64]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.measured = [{} for _ in self.recordings]

    @classmethod
    def of(
        cls,
        recordings: Sequence[Recording],
        topology: Topology,
        options: PlanOptions,
        *,
        clock: Clock,
        progress: ProgressCallback | None = None,
    ) -> Beside:
        """Of the problem that the options pose, its slots resolved."""
        solver = get_solver(options.solver, options.config)
        problem = PlacementProblem.from_workload(
            workload_of(recordings, options),
            topology,
            objective=solver.objectives[0],
            slots_per_rank=options.slots_per_rank,
        )
        return cls(
            problem=problem,
            recordings=recordings,
            options=replace(options, slots_per_rank=problem.slots_per_rank),
            clock=clock,
            progress=progress,
        )

    def solve(self, shares: int = 1) -> Solution:
        """What the solver makes of the baselines, as one of `shares` that are left."""
        options, history = self.options, History(forward=self.progress)
        start = self.start()
        solver = get_solver(options.solver, options.config)
        if self.interrupted and start is not None and options.stay is None:
            found = finish(
                *(solver, self.problem, start, self.clock),
                status=SolveStatus.INTERRUPTED,
                value=self._start_seconds(),
            )
        else:
            found = solver.solve(
                self.problem, self.limited(shares), warm_start=start, progress=history
            )
        if self.interrupted:
            found = interrupted(found)
        found = self.held(found)
        return with_source(found, self.recordings, options, history.points())

    def score_in_use(self) -> None:
        """What the plan starts from, where it starts from something."""
        stay = self.options.stay
        if stay is not None:
            self._measure(IN_USE, stay)

    def solve_quick(self, wanted: Baselines) -> None:
        """Those that take seconds: no new one once their part of the time is up."""
        left = self.clock.left
        part = Clock(time_limit=min(max(BASELINE_SHARE * left, LEAST_SECONDS), left))
        self._solve(wanted, QUICK, self.options.solver_options, clock=part)

    def solve_slow(self, wanted: Baselines, *, hurry: bool) -> None:
        """The others, in what is left."""
        self._solve(wanted, SLOW, self.limited(1), hurry=hurry)

    def limited(self, shares: int) -> SolverOptions:
        """Options of one of so many solvers that share what is left."""
        kept = SCORE_MARGIN * self._score_seconds
        if self._is_held():  # to hold it to the baselines takes valuations
            kept += self._holding_seconds()
        seconds = self.clock.left / shares - kept
        if self.interrupted:
            seconds = 0.0
        return replace(
            self.options.solver_options, time_limit=max(seconds, MIN_SOLVER_SECONDS)
        )

    def start(self) -> Placement | None:
        """The best layers of the baselines, where the solver begins with them."""
        return None if self._is_held() else self._best_known()

    def held(self, found: Solution) -> Solution:
        """`found`, no slower than a baseline where few ranks are favoured.

        Layers that cost most time become those of the best baselines, and a stage says
        how many; of a placement in use, those in use.
        """
        stay = self.options.stay
        best = self._best_known() if stay is None else stay
        if not self._is_held() or best is None:
            return found
        config = self.options.config
        value_of = Incumbent(
            problem=self.problem, stay=stay, move_seconds=config.move_seconds
        ).value_of
        most = self._least_seconds() if stay is None else value_of(stay)
        if value_of(found.placement) <= most:
            return found
        began, kept = self.clock.seconds, SCORE_MARGIN * self._score_seconds
        hurry = found.status is SolveStatus.INTERRUPTED
        placement, number = held_layers(
            *(self.problem, found.placement, best, value_of, most),
            lambda: 0.0 if hurry else self.clock.left - kept,
        )
        value = self.problem.objective_value(placement)
        source = "the baselines" if stay is None else "the placement in use"
        stage = Stage(
            name=f"{number} of {self.problem.num_layers} layers from {source}: faster",
            objective=self.problem.objective,
            value=value,
            lower_bound=found.lower_bound,
            status=found.status,
            seconds=self.clock.seconds - began,
        )
        told = replace(found.placement.provenance, value=value)
        return replace(
            found,
            placement=replace(placement, provenance=told),
            value=value,
            stages=(*found.stages, stage),
        )

    def _holding_seconds(self) -> float:
        """Of the valuations of `held`, by halving."""
        return (2 + math.log2(self.problem.num_layers)) * self._value_seconds

    def _least_seconds(self) -> float:
        """The modelled time of the fastest baseline."""
        whole = is_sum_of_layers(self.problem)
        return min(float(c.sum() if whole else c[0]) for c in self._costs.values())

    def _best_known(self) -> Placement | None:
        """The best layers of the baselines, which no plan may be slower than."""
        names = list(self._costs)
        if not names:
            return None
        return best_layers(
            [self.solutions[name].placement for name in names],
            [self._costs[name] for name in names],
        )

    def _start_seconds(self) -> float:
        """The modelled time of `start`, known from its layers."""
        best = np.array(list(self._costs.values())).min(axis=0)
        return float(best.sum() if is_sum_of_layers(self.problem) else best[0])

    def improved(self, result: Solution) -> Solution:
        """The result, or the best layers of all where those are faster."""
        if self._is_held():
            return self.held(result)
        start = self.start()
        if start is None:
            return result
        value = self.problem.objective_value(start)
        if value >= result.value:
            return result
        told = replace(result.placement.provenance, value=value)
        return replace(result, placement=replace(start, provenance=told), value=value)

    def _solve(
        self,
        wanted: Baselines,
        among: tuple[str, ...],
        limit: SolverOptions,
        *,
        hurry: bool = False,
        clock: Clock | None = None,
    ) -> None:
        found = solve_baselines(
            self.problem,
            wanted,
            limit,
            skip=self.options.solver,
            among=among,
            hurry=hurry,
            clock=clock,
            on_solved=self._score,
        )
        self.left_out.update(found.left_out)
        self.interrupted = self.interrupted or found.interrupted

    def _score(self, name: str, solution: Solution) -> None:
        """Score one, and say so."""
        self._measure(name, solution.placement)
        if self._counts():
            began = self.clock.seconds
            self._costs[name] = layer_costs(self.problem, solution.placement)
            took = self.clock.seconds - began
            self._value_seconds = max(self._value_seconds, took)
        self.solutions[name] = solution
        if self.progress:
            self.progress(
                ProgressEvent(
                    solver=name,
                    stage="baselines",
                    done=len(self.solutions),
                    total=len(baseline_names(self.problem, self.options.baselines)),
                    seconds=self.clock.seconds,
                )
            )

    def _measure(self, name: str, placement: Placement) -> None:
        began, options = self.clock.seconds, self.options
        seed = options.solver_options.seed
        for recording, scores in zip(self.recordings, self.measured, strict=True):
            scores[name] = measure(recording, placement, options.pricing, seed)
        self._score_seconds = max(self._score_seconds, self.clock.seconds - began)

    def _counts(self) -> bool:
        """Whether no plan may be slower than the baselines: not where it is of them."""
        timed = self.problem.objective is Objective.MODELLED_TIME
        return timed and self.options.solver not in BASELINES

    def _is_held(self) -> bool:
        """Whether few ranks are favoured: searched without the baselines at first."""
        favour = getattr(self.options.config, "favour", Favour.TIME)
        return self._counts() and favour is Favour.FEW_RANKS
