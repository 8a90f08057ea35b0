"""Every placement of a tiny instance: the truth that other solvers are tested with.

Objectives add up over layers or over pairs of neighbours, so the best of all
combinations is a shortest path over the layers' placements. The memory row, homes that
follow and a worst case couple all layers; then every combination is looked at.
"""

from __future__ import annotations

import itertools
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np

from moetuner.errors import SolverError
from moetuner.evaluation.cost import Homes
from moetuner.problem import Objective
from moetuner.solver.base import (
    Clock,
    ProgressCallback,
    Solution,
    SolverOptions,
    SolveStatus,
    finish,
    place,
)
from moetuner.solver.exact.partitions import legal_layers
from moetuner.solver.heuristics.lpt import balanced_rank_of

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from moetuner.placement.model import Placement
    from moetuner.problem import PlacementProblem

MAX_STATES = 2_000
MAX_COMBINATIONS = 200_000


class OracleSolver:
    """Exhaustive search; refuses instances that are not tiny."""

    name = "oracle"
    objectives = tuple(Objective)

    def solve(
        self,
        problem: PlacementProblem,
        options: SolverOptions = SolverOptions(),
        *,
        warm_start: Placement | None = None,
        progress: ProgressCallback | None = None,  # noqa: ARG002
    ) -> Solution:
        """See `moetuner.solver.Solver`."""
        clock = Clock(time_limit=options.time_limit)
        status, bound = SolveStatus.OPTIMAL, None
        try:
            states = _layer_states(problem)
            if _couples_layers(problem):
                path = _every_combination(problem, states, clock)
            else:
                path = _shortest_path(problem, states, clock)
            rank_of = states[path]
            bound = _value(problem, rank_of)
        except TimeoutError:  # half an enumeration proves and finds nothing
            status, rank_of = SolveStatus.TIME_LIMIT, balanced_rank_of(problem)
        except KeyboardInterrupt:
            status, rank_of = SolveStatus.INTERRUPTED, balanced_rank_of(problem)
        return finish(
            self,
            problem,
            rank_of,
            clock,
            status=status,
            lower_bound=bound,
            warm_start=warm_start,
        )


def _couples_layers(problem: PlacementProblem) -> bool:
    """Whether the objective or a row ties together more than neighbouring layers."""
    if problem.memory_slack is not None and not problem.equal_slots:
        return True
    workload = problem.workload
    if problem.objective is not Objective.MODELLED_TIME or workload is None:
        return False
    return workload.worst_case or workload.cost.homes is Homes.FOLLOW


def _check_time(clock: Clock) -> None:
    if clock.left <= 0:
        raise TimeoutError


def _layer_states(problem: PlacementProblem) -> NDArray[np.int32]:
    """All legal rank_of rows of one layer, int32 [states, E]."""
    states = legal_layers(problem)
    if states is None:
        raise SolverError(
            f"oracle: {problem.num_experts} experts on {problem.topology.num_ranks} "
            f"ranks is too large to enumerate"
        )
    if len(states) > MAX_STATES:
        raise SolverError(
            f"oracle: {len(states)} placements of one layer, at most {MAX_STATES} are "
            f"enumerated"
        )
    return states


def _shortest_path(
    problem: PlacementProblem, states: NDArray[np.int32], clock: Clock
) -> NDArray[np.int64]:
    """State of each layer, int64 [L], that minimises the objective."""
    if problem.objective not in (Objective.LINK_TRAFFIC, Objective.TOTAL_TRAFFIC):
        best_states = []
        for layer in range(problem.num_layers):
            table = []
            for rows in _one_layer_varied(problem, states, layer):
                _check_time(clock)
                table.append(_value(problem, rows))
            best_states.append(np.argmin(table))
        return np.array(best_states)
    onehot = np.eye(problem.topology.num_ranks)[states]  # [states, E, G]
    transitions = problem.statistics.require_transitions("oracle").astype(float)
    best = np.zeros(len(states))
    came_from = []
    for step in transitions:
        cost = np.empty((len(states), len(states)))
        for i, here in enumerate(onehot):
            _check_time(clock)
            cost[i] = _flow_cost(problem, (here.T @ step) @ onehot)
        totals = best[:, None] + cost
        came_from.append(totals.argmin(axis=0))
        best = totals.min(axis=0)
    path = [int(best.argmin())]
    for previous in reversed(came_from):
        path.append(int(previous[path[-1]]))
    return np.array(path[::-1])


def _one_layer_varied(
    problem: PlacementProblem, states: NDArray[np.int32], layer: int
) -> NDArray[np.int32]:
    rows = np.tile(states[0], (len(states), problem.num_layers, 1))
    rows[:, layer] = states
    return rows


def _every_combination(
    problem: PlacementProblem, states: NDArray[np.int32], clock: Clock
) -> NDArray[np.int64]:
    if len(states) ** problem.num_layers > MAX_COMBINATIONS:
        raise SolverError(
            f"oracle: {len(states)} placements in {problem.num_layers} layers that "
            f"depend on each other are too many combinations"
        )
    best, best_value = None, np.inf
    for path in itertools.product(range(len(states)), repeat=problem.num_layers):
        _check_time(clock)
        rows = states[list(path)]
        if not problem.keeps_memory(rows):
            continue
        value = _value(problem, rows)
        if value < best_value:
            best, best_value = path, value
    if best is None:
        raise SolverError(
            f"oracle: no placement keeps memory_slack={problem.memory_slack}"
        )
    return np.array(best)


def _flow_cost(
    problem: PlacementProblem, flows: NDArray[np.float64]
) -> NDArray[np.float64]:
    if problem.objective is Objective.LINK_TRAFFIC:
        return np.asarray((flows * problem.link_seconds()).max(axis=(1, 2)))
    return np.asarray(-np.trace(flows, axis1=1, axis2=2))


def _value(problem: PlacementProblem, rank_of: NDArray[np.int32]) -> float:
    free = replace(problem, memory_slack=None)
    return free.objective_value(place(problem, rank_of))
