"""What a placement in use makes of another one: the layers where moving pays."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np

from moetuner.placement.model import EMPTY, Placement
from moetuner.placement.moves import fetched_replicas

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from moetuner.problem import PlacementProblem


def layers_that_pay(
    problem: PlacementProblem,
    base: Placement,
    other: Placement,
    *,
    stay: Placement,
    move_seconds: float,
) -> Placement:
    """`base` with the layers of `other` that save more than their moves cost.

    Both in the problem's slots; moves are counted from `stay`, ``move_seconds`` for
    each replica to fetch. Exact where a layer's time depends on that layer alone (homes
    not `Homes.FOLLOW`).
    """
    base, other = widened(base, problem), widened(other, problem)
    costs = [
        problem.workload.layer_seconds(each)
        + move_seconds * fetched_by_layer(stay, each)
        for each in (base, other)
    ]
    pays = (costs[1] < costs[0])[:, None]
    slots = np.where(pays, other.slot_experts, base.slot_experts)
    return replace(base, slot_experts=slots)


def fetched_by_layer(stay: Placement, placement: Placement) -> NDArray[np.int64]:
    """Replicas to fetch in each layer, int64 [L]."""
    per_layer = placement.num_experts * placement.topology.num_ranks
    layer = fetched_replicas(stay, placement) // per_layer
    return np.bincount(layer, minlength=placement.num_layers)


def widened(placement: Placement, problem: PlacementProblem) -> Placement:
    """The same with as many slots per rank as the problem has, empty ones last."""
    if placement.slots_per_rank == problem.slots_per_rank:
        return placement
    layers, ranks = placement.num_layers, placement.topology.num_ranks
    old = placement.slot_experts.reshape(layers, ranks, -1)
    filled_first = np.argsort(old == EMPTY, axis=2, kind="stable")
    old = np.take_along_axis(old, filled_first, axis=2)[..., : problem.slots_per_rank]
    slots = np.full((layers, ranks, problem.slots_per_rank), EMPTY, np.int32)
    slots[..., : old.shape[2]] = old
    return replace(placement, slot_experts=slots.reshape(layers, -1))
