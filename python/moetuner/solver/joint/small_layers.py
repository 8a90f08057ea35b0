"""Layers of few experts, by methods that are exact: a last stage of `joint`.

With uniform homes, dynamic programming or programs of whole layers, which prove what
they find. With other homes every placement is tried, where there are very few: a search
prices what it can price fast, sees no row that passes through a gateway, and ended up
to 13 % above the optimum of tiny instances.

Legend: L layers, E experts, G ranks.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from moetuner.errors import MissingDependencyError
from moetuner.evaluation.cost import Homes
from moetuner.solver.base import SolverOptions, SolveStatus, place
from moetuner.solver.exact.exact import ExactSolver
from moetuner.solver.exact.partitions import legal_layers
from moetuner.solver.joint.profiles import Favour
from moetuner.solver.programs.ilp import IlpSolver
from moetuner.trace import Trace

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from moetuner.placement.model import Placement
    from moetuner.problem import PlacementProblem
    from moetuner.solver.base import Clock, Solution
    from moetuner.solver.joint.config import JointConfig
    from moetuner.solver.joint.incumbent import Incumbent
    from moetuner.solver.joint.interruptible import Interruptible

MAX_PLACEMENTS = 2_000
"""Placements of a layer up to which all are tried."""
EXACT_EXPERTS = 8
"""Experts up to which dynamic programming takes a moment."""
MAX_EXPERTS = 12
"""Experts up to which programs of whole layers find what the search does not."""


def has_kernel(problem: PlacementProblem, config: JointConfig) -> bool:
    """Whether exact methods come last: layers alone, small, with no room for replicas.

    They are no rounds, and know neither a profile nor moves. On batches that were not
    planned on smoothed plans are as good or better, so it is for one trace alone.
    """
    workload = problem.workload
    return (
        config.favour is Favour.TRACE
        and not config.rounds
        and config.profile is None
        and config.stay is None
        and problem.topology.num_ranks > 1
        and problem.num_experts <= MAX_EXPERTS
        and not problem.wants_replicas
        and workload.cost.homes is Homes.UNIFORM
        and all(isinstance(trace, Trace) for trace in workload.traces)
        and not workload.takes_slowest
    )


def finish_small_layers(
    incumbent: Incumbent,
    config: JointConfig,
    options: SolverOptions,
    clock: Clock,
    runner: Interruptible,
) -> bool:
    """Exact methods where layers are small; whether there were any to use."""
    problem = incumbent.problem
    if not has_kernel(problem, config):
        if problem.workload.cost.homes is Homes.UNIFORM:
            return False
        return runner.run(lambda stop: try_all(incumbent, clock, stop))
    try:
        solution = solve_small_layers(problem, options, clock, incumbent.placement)
    except MissingDependencyError:  # CBC is an extra; what was found stands without
        return False
    incumbent.offer(solution.placement)
    if solution.lower_bound is not None:
        incumbent.bound = max(incumbent.bound or 0.0, solution.lower_bound)
    if solution.status is SolveStatus.INTERRUPTED:
        runner.stop[0] = 1
    return True


def solve_small_layers(
    problem: PlacementProblem, options: SolverOptions, clock: Clock, start: Placement
) -> Solution:
    """The optimum, or the best that is found from `start` in the time that is left."""
    left = replace(options, time_limit=clock.left)
    alike = problem.workload.cost.alike(problem.topology)
    if problem.num_experts <= EXACT_EXPERTS and alike:
        solution = ExactSolver().solve(problem, left, warm_start=start)
        if solution.status is not SolveStatus.TIME_LIMIT or clock.left <= 0:
            return solution
        left = replace(options, time_limit=clock.left)
    return IlpSolver().solve(problem, left, warm_start=start)


def try_all(incumbent: Incumbent, clock: Clock, stop: NDArray[np.int32]) -> bool:
    """Try every placement of each layer in turn, until none is better.

    Returns
    -------
    Whether there were few enough, and no replicas, so that they were tried.
    """
    problem = incumbent.problem
    states = legal_layers(problem)
    if states is None or len(states) > MAX_PLACEMENTS:
        return False
    if incumbent.placement.has_replicas:
        return False
    unchanged, layer = 0, 0
    while unchanged < problem.num_layers:
        before = incumbent.value
        rank_of = incumbent.placement.rank_of()
        for state in states:
            if stop[0] or clock.left <= 0:
                return True
            rank_of[layer] = state
            incumbent.offer(place(problem, rank_of))
        unchanged = unchanged + 1 if incumbent.value >= before else 1
        layer = (layer + 1) % problem.num_layers
    return True
