"""Spare slots filled with replicas by simple rules.

The walk along tokens begins there, and no plan with spare slots is slower than these.

Legend: L layers, E experts, G ranks, S slots per rank.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np

from moetuner.evaluation.cost import Homes
from moetuner.placement.model import EMPTY
from moetuner.solver.base import SolverOptions
from moetuner.solver.heuristics.eplb import EplbSolver
from moetuner.solver.joint.replan import widened

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from moetuner.placement.model import Placement
    from moetuner.problem import PlacementProblem
    from moetuner.solver.base import Clock


def filled(problem: PlacementProblem, placements: list[Placement]) -> list[Placement]:
    """The placements as they are, with their spare slots filled, and EPLB's own.

    Each once, what is likely to be good first.
    """
    plain = [widened(placement, problem) for placement in placements]
    found = [
        *plain,
        *(spread_replicas(problem, placement) for placement in plain),
        EplbSolver().solve(problem, SolverOptions()).placement,
        *(replicate_busiest(problem, placement) for placement in plain),
    ]
    return list({placement.sha256(): placement for placement in found}.values())


def spread_replicas(problem: PlacementProblem, placement: Placement) -> Placement:
    """One replica after the other: of the most rows per replica, to the lightest rank.

    An expert's rows are shared evenly by its replicas.
    """
    slots = _by_rank(problem, placement)
    num_experts = problem.num_experts
    for layer, rows in zip(slots, problem.statistics.load, strict=True):
        holds = np.zeros((len(layer), num_experts), bool)
        ranks, places = np.nonzero(layer >= 0)
        holds[ranks, layer[ranks, places]] = True
        free = (layer == EMPTY).sum(axis=1)
        replicas = holds.sum(axis=0)
        while free.any():
            share = rows / replicas
            fits = (free > 0)[:, None] & ~holds
            expert = int(np.where(fits.any(axis=0), share, -1.0).argmax())
            if not fits[:, expert].any():
                break
            light = np.where(fits[:, expert], holds @ share, np.inf)
            rank = int(light.argmin())
            layer[rank, int((layer[rank] == EMPTY).argmax())] = expert
            holds[rank, expert] = True
            free[rank] -= 1
            replicas[expert] += 1
    return replace(placement, slot_experts=slots.reshape(problem.num_layers, -1))


def replicate_busiest(problem: PlacementProblem, placement: Placement) -> Placement:
    """The busiest experts on every rank that has room and lacks them."""
    slots = _by_rank(problem, placement)
    for layer, rows in zip(slots, problem.statistics.load, strict=True):
        busiest = np.argsort(-rows, kind="stable").astype(np.int32)
        for rank in layer:
            lacking = busiest[~np.isin(busiest, rank)]
            free = np.flatnonzero(rank == EMPTY)[: lacking.size]
            rank[free] = lacking[: free.size]
    return replace(placement, slot_experts=slots.reshape(problem.num_layers, -1))


def cheapest_layers(
    problem: PlacementProblem, placements: list[Placement], clock: Clock
) -> Placement:
    """Each layer as in the placement where its modelled time is least.

    Where homes follow, a layer's time depends on the one before: then the placement
    that is best as a whole. Looks at no more of them than the clock allows, but at the
    first.
    """
    workload = problem.workload
    whole = workload.cost.homes is Homes.FOLLOW or workload.takes_slowest
    seconds: list[NDArray[np.float64]] = []
    for placement in placements:
        if seconds and not clock.left:
            break
        if whole:
            value = problem.objective_value(placement)
            seconds.append(np.full(problem.num_layers, value))
        else:
            seconds.append(workload.layer_seconds(placement))
    best = np.array(seconds).argmin(axis=0)
    slots = np.stack([placement.slot_experts for placement in placements])
    return replace(
        placements[0], slot_experts=slots[best, np.arange(problem.num_layers)]
    )


def _by_rank(problem: PlacementProblem, placement: Placement) -> NDArray[np.int32]:
    """A copy of the slots, int32 [L, G, S]."""
    shape = problem.num_layers, problem.topology.num_ranks, problem.slots_per_rank
    slots: NDArray[np.int32] = np.array(widened(placement, problem).slot_experts)
    return slots.reshape(shape)
