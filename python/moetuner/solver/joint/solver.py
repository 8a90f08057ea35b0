"""The joint planner: load, copies and links of every batch at once.

Annealed swaps in the C++ core, with exact changes of the modelled time of sampled
batches. Uniform homes leave layers independent: each is searched for itself, on all
cores. Where homes follow or are recorded, or slots can be spared for replicas, a second
phase walks the tokens through all layers. See ``docs/planning.md``.
"""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

from moetuner.bounds import counting_bound
from moetuner.problem import Objective
from moetuner.solver.base import (
    Clock,
    ProgressCallback,
    Solution,
    SolverOptions,
    SolveStatus,
    check_objective,
    finish,
)
from moetuner.solver.heuristics.starts import (
    FAST_STARTS,
    quick_placements,
    quick_starts,
)
from moetuner.solver.joint.config import JointConfig
from moetuner.solver.joint.incumbent import Incumbent
from moetuner.solver.joint.profiles import Favour
from moetuner.solver.joint.replan import widened
from moetuner.solver.joint.replicas import without_spare
from moetuner.solver.joint.run import MIN_TRIAL_TIME, Run
from moetuner.solver.joint.worst_case import solve_worst_case

if TYPE_CHECKING:
    from moetuner.placement.model import Placement
    from moetuner.problem import PlacementProblem

__all__ = ["JointConfig", "JointSolver"]


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
        """See `moetuner.solver.Solver`.

        With a placement to stay near, of ``warm_start`` what is worth its moves.
        """
        check_objective(self, problem)
        if problem.workload.takes_slowest:
            return solve_worst_case(
                self,
                problem,
                options,
                starts=[
                    *self._floors(problem),
                    *([] if warm_start is None else [warm_start]),
                ],
                value_of=Incumbent(
                    problem=problem,
                    stay=self.config.stay,
                    move_seconds=self.config.move_seconds,
                ).value_of,
                progress=progress,
            )
        return self._solve(problem, options, warm_start, progress)

    def _solve(
        self,
        problem: PlacementProblem,
        options: SolverOptions,
        warm_start: Placement | None,
        progress: ProgressCallback | None,
        *,
        bounded: bool = True,
    ) -> Solution:
        """A solve; one that is part of one with more slots needs no bound."""
        run = Run(
            config=self.config,
            problem=problem,
            options=options,
            progress=progress,
            clock=Clock(time_limit=options.time_limit),
            solve_fewer=lambda fewer, limited, config, start: JointSolver(
                config=config
            )._solve(fewer, limited, start, progress, bounded=False),
        )
        if self.config.stay is not None:
            problem.check(self.config.stay)
            run.incumbent.offer(self.config.stay)
            if warm_start is not None:  # what pays of it
                run.offer_layers(self.config.stay, warm_start)
        else:
            if warm_start is not None:
                problem.check(warm_start)
                run.incumbent.offer(warm_start)
            # With a start that is known the slow ones of them are left out; with spare
            # slots they are those of the plan without them.
            most = None if warm_start is None else FAST_STARTS
            tight = without_spare(problem)
            for placement in itertools.islice(quick_starts(tight), most):
                run.incumbent.offer(widened(placement, problem))
                if not run.clock.left:
                    break
        if self.config.favour is not Favour.FEW_RANKS:  # few of them may well cost time
            run.incumbent.floor = run.incumbent.value
        run.keep_time_to_close()
        # It was offered, so nothing that came later is worse.
        knows_start = self.config.stay is not None or run.incumbent.floor < math.inf
        status = SolveStatus.HEURISTIC
        try:
            if bounded:
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
                warm_start=None if knows_start else warm_start,
                value=run.incumbent.objective if run.runner.interrupted else None,
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
