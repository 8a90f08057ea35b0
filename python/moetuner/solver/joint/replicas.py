"""Spare slots filled with replicas by simple rules.

The walk along tokens begins there, and no plan with spare slots is slower than these.

Legend: L layers, E experts, G ranks, S slots per rank.
"""

from __future__ import annotations

import itertools
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np

from moetuner.evaluation.cost import Homes
from moetuner.placement.model import EMPTY, Placement
from moetuner.solver.base import Clock, SolverOptions
from moetuner.solver.heuristics.eplb import EplbSolver
from moetuner.solver.joint.replan import widened

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from numpy.typing import NDArray

    from moetuner.problem import PlacementProblem


def without_spare(problem: PlacementProblem) -> PlacementProblem:
    """The same with just enough slots."""
    return replace(problem, slots_per_rank=problem.min_slots)


def filled(
    problem: PlacementProblem, placements: Iterable[Placement]
) -> Iterator[Placement]:
    """The placements as they are, with their spare slots filled, and EPLB's own.

    Each once, what is likely to be good first; made one by one, as they are asked for.
    """
    plain = [widened(placement, problem) for placement in placements]
    seen: set[str] = set()
    for placement in itertools.chain(
        plain,
        (spread_replicas(problem, placement) for placement in plain),
        (relieve_busiest(problem, placement) for placement in plain),
        map(_eplb, [problem]),
        (replicate_busiest(problem, placement) for placement in plain),
    ):
        if (name := placement.sha256()) not in seen:
            seen.add(name)
            yield placement


def _eplb(problem: PlacementProblem) -> Placement:
    options = SolverOptions()
    clock = Clock(time_limit=options.time_limit)
    found = EplbSolver().answer(problem, options, clock).found
    assert isinstance(found, Placement)
    return found


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


def relieve_busiest(problem: PlacementProblem, placement: Placement) -> Placement:
    """One replica after the other of what the busiest ranks hold, while loads fall.

    Of each pair of an expert of the two busiest ranks and a rank with room the one
    after which the fullest rank has least, ties by the sum of squares. An expert's rows
    are shared evenly by its replicas.
    """
    slots = _by_rank(problem, placement)
    for layer, rows in zip(slots, problem.statistics.load, strict=True):
        holds = np.zeros((len(layer), problem.num_experts), bool)
        ranks, places = np.nonzero(layer >= 0)
        holds[ranks, layer[ranks, places]] = True
        while (layer == EMPTY).any():
            share = rows / np.maximum(holds.sum(axis=0), 1)
            loads = holds @ share
            found = _best_relief(holds, share, loads, (layer == EMPTY).any(axis=1))
            if found is None:
                break
            rank, expert = found
            layer[rank, int((layer[rank] == EMPTY).argmax())] = expert
            holds[rank, expert] = True
    return replace(placement, slot_experts=slots.reshape(problem.num_layers, -1))


def _best_relief(
    holds: NDArray[np.bool_],
    share: NDArray[np.float64],
    loads: NDArray[np.float64],
    room: NDArray[np.bool_],
) -> tuple[int, int] | None:
    """(rank, expert) of the replica that relieves most, None when none does."""

    def tightness(loads: NDArray[np.float64]) -> NDArray[np.float64]:
        peak: NDArray[np.float64] = loads.max(axis=-1)
        spread: NDArray[np.float64] = np.sqrt((loads**2).sum(axis=-1))
        return peak + 1e-3 * spread

    busiest = np.argsort(-loads, kind="stable")[:2]
    experts = np.flatnonzero(holds[busiest].any(axis=0))
    ranks = np.flatnonzero(room)
    count = holds[:, experts].sum(axis=0)
    less = share[experts] / (count + 1)  # what each holder is relieved of
    after = loads - holds[:, experts].T * less[:, None]  # [experts, G]
    new = np.repeat(after[:, None], len(ranks), axis=1)  # [experts, ranks, G]
    here = np.arange(len(ranks))
    new[:, here, ranks] += (share[experts] - less)[:, None]
    cost = np.where(holds[ranks][:, experts].T, np.inf, tightness(new))
    expert, rank = np.unravel_index(int(cost.argmin()), cost.shape)
    if not cost[expert, rank] < tightness(loads):
        return None
    return int(ranks[rank]), int(experts[expert])


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
    problem: PlacementProblem, placements: Iterable[Placement], clock: Clock
) -> list[Placement]:
    """Each layer as in the placement where its modelled time is least; then those.

    Where homes follow, a layer's time depends on the one before: then the placement
    that is best as a whole. Looks at no more of them than the clock allows, but at the
    first.
    """
    costs: list[NDArray[np.float64]] = []
    seen: list[Placement] = []
    for placement in placements:
        seen.append(placement)
        costs.append(layer_costs(problem, placement))
        if not clock.left:
            break
    return [best_layers(seen, costs), *seen]


def layer_costs(problem: PlacementProblem, placement: Placement) -> NDArray[np.float64]:
    """The modelled time of each layer, [L]; that of all where it is no sum of them."""
    if not is_sum_of_layers(problem):
        return np.full(problem.num_layers, problem.objective_value(placement))
    seconds: NDArray[np.float64] = problem.workload.layer_seconds(placement)
    return seconds


def is_sum_of_layers(problem: PlacementProblem) -> bool:
    """Whether the modelled time is a sum of layers that do not depend on each other."""
    workload = problem.workload
    return workload.cost.homes is not Homes.FOLLOW and not workload.takes_slowest


def best_layers(
    placements: list[Placement], costs: list[NDArray[np.float64]]
) -> Placement:
    """Each layer as in the placement where its cost is least, in slots of all."""
    best = np.array(costs).argmin(axis=0)
    slots = np.stack([placement.slot_experts for placement in placements])
    return replace(placements[0], slot_experts=slots[best, np.arange(slots.shape[1])])


def _by_rank(problem: PlacementProblem, placement: Placement) -> NDArray[np.int32]:
    """A copy of the slots, int32 [L, G, S]."""
    shape = problem.num_layers, problem.topology.num_ranks, problem.slots_per_rank
    slots: NDArray[np.int32] = np.array(widened(placement, problem).slot_experts)
    return slots.reshape(shape)
