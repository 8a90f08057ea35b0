"""Plans for the slowest of several traces: weights that move towards it.

A largest mean has nothing to say about the traces below it, so a search that follows it
alone is blind to most swaps. A weighted mean of all traces is not, and the weights for
which it finds the least maximum are found as in zero-sum games: what is slow counts
more next time (multiplicative weights; Freund and Schapire, 1999).
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np

from moetuner.solver.base import (
    Clock,
    ProgressCallback,
    Solution,
    Solver,
    SolverOptions,
    SolveStatus,
    finish,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from moetuner.placement.model import Placement
    from moetuner.problem import PlacementProblem

PASSES = 4
"""Plans that are made, each in its share of the time; the best one counts."""
RATE = 20.0
"""A trace that takes 1 % longer than another weighs exp(0.01 RATE) more next time."""


def solve_worst_case(
    solver: Solver,
    problem: PlacementProblem,
    options: SolverOptions,
    *,
    starts: Sequence[Placement],
    value_of: Callable[[Placement], float],
    progress: ProgressCallback | None = None,
) -> Solution:
    """The best of `starts` and some plans by `solver`, which takes weighted means.

    ``value_of`` says which is best: the objective, and what moves cost.
    """
    workload = problem.workload
    clock = Clock(time_limit=options.time_limit)
    began = clock.seconds
    values = [value_of(start) for start in starts]
    # What it takes to value every plan, twice at the end.
    each = (clock.seconds - began) / max(len(values), 1)
    weights = np.full(len(workload.traces), 1 / len(workload.traces))
    found: list[Solution] = []
    interrupted = False
    try:
        for number in range(PASSES):
            left = clock.left - (PASSES - number + 2) * each
            share = replace(options, time_limit=max(left / (PASSES - number), 1e-3))
            weighed = replace(
                workload, worst_case=False, weights=tuple(weights.tolist())
            )
            part = replace(problem, workload=weighed)
            found.append(solver.solve(part, share, progress=progress))
            if found[-1].status is SolveStatus.INTERRUPTED:
                break
            placement = found[-1].placement
            times = np.array([t.mean() for t in workload.batch_seconds(placement)])
            if not times.max() > 0:
                break
            weights *= np.exp(RATE * (times / times.max() - 1))
            weights = np.maximum(weights / weights.sum(), 1e-6)
    except KeyboardInterrupt:  # beside the solver
        if not found:
            raise
        interrupted = True
    placements = [*starts, *(solution.placement for solution in found)]
    values += [value_of(solution.placement) for solution in found]
    best = placements[values.index(min(values))]
    # A mean is at most the maximum, so each plan's bound is one of the maximum too.
    bounds = [each.lower_bound for each in found if each.lower_bound is not None]
    status = found[-1].status
    if status is SolveStatus.OPTIMAL:  # of a weighted mean only
        status = SolveStatus.HEURISTIC
    if interrupted:
        status = SolveStatus.INTERRUPTED
    return finish(
        solver,
        problem,
        best,
        clock,
        status=status,
        lower_bound=max(bounds, default=None),
        stages=tuple(stage for each in found for stage in each.stages),
    )
