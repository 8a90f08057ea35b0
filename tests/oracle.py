"""The optimum of a tiny problem, by trying every placement: what tests believe.

Objectives add up over layers or over pairs of neighbours, so the best of all
combinations is a shortest path over the layers' placements. Homes that follow and a
worst case couple all layers; then every combination is looked at. Replicas are not.
"""

import itertools
from dataclasses import dataclass

import numpy as np
from moetuner.evaluation.cost import Homes
from moetuner.placement.model import Placement
from moetuner.problem import Objective
from moetuner.solver.base import place
from moetuner.solver.exact.partitions import legal_layers

MAX_STATES = 2_000
MAX_COMBINATIONS = 200_000


@dataclass(frozen=True)
class Optimum:
    placement: Placement
    value: float


def oracle(problem):
    """An `Optimum` of the problem; ValueError where that is too much to try."""
    states = legal_layers(problem)
    if states is None or len(states) > MAX_STATES:
        raise ValueError(
            f"oracle: {problem.num_experts} experts on {problem.topology.num_ranks} "
            f"ranks have too many placements"
        )
    search = _every_combination if _couples_layers(problem) else _shortest_path
    placement = place(problem, states[search(problem, states)])
    return Optimum(placement, problem.objective_value(placement))


def _couples_layers(problem):
    """Whether the objective ties together more than neighbouring layers."""
    workload = problem.workload
    return problem.objective is Objective.MODELLED_TIME and (
        workload.worst_case or workload.cost.homes is Homes.FOLLOW
    )


def _shortest_path(problem, states):
    """State of each layer, int64 [L], that minimises the objective."""
    if problem.objective is Objective.MODELLED_TIME:
        return _times_of_layers(problem, states).argmin(axis=0)
    if problem.objective not in (Objective.LINK_TRAFFIC, Objective.TOTAL_TRAFFIC):
        return np.array(
            [
                np.argmin(
                    [_value(problem, rows) for rows in _varied(problem, states, i)]
                )
                for i in range(problem.num_layers)
            ]
        )
    onehot = np.eye(problem.topology.num_ranks)[states]  # [states, E, G]
    transitions = problem.statistics.require_transitions("oracle").astype(float)
    best, came_from = np.zeros(len(states)), []
    for step in transitions:
        cost = np.stack(
            [_flow_cost(problem, (one.T @ step) @ onehot) for one in onehot]
        )
        totals = best[:, None] + cost
        came_from.append(totals.argmin(axis=0))
        best = totals.min(axis=0)
    path = [int(best.argmin())]
    for previous in reversed(came_from):
        path.append(int(previous[path[-1]]))
    return np.array(path[::-1])


def _times_of_layers(problem, states):
    """Seconds [states, L]: of placements whose layers are all in one state."""
    alike = (place(problem, np.tile(s, (problem.num_layers, 1))) for s in states)
    return np.stack([problem.workload.layer_seconds(each) for each in alike])


def _varied(problem, states, layer):
    """Ranks [states, L, E] in which one layer takes every state."""
    rows = np.tile(states[0], (len(states), problem.num_layers, 1))
    rows[:, layer] = states
    return rows


def _every_combination(problem, states):
    if len(states) ** problem.num_layers > MAX_COMBINATIONS:
        raise ValueError(
            f"oracle: {len(states)} placements in {problem.num_layers} layers that "
            f"depend on each other are too many combinations"
        )
    paths = itertools.product(range(len(states)), repeat=problem.num_layers)
    best = min(paths, key=lambda path: _value(problem, states[list(path)]))
    return np.array(best)


def _flow_cost(problem, flows):
    if problem.objective is Objective.LINK_TRAFFIC:
        return (flows * problem.link_seconds()).max(axis=(1, 2))
    return -np.trace(flows, axis1=1, axis2=2)


def _value(problem, rank_of):
    return problem.objective_value(place(problem, rank_of))
