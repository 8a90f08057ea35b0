"""A new map in the order in which the fewest experts move from the map in use.

Ranks of a node do the same work whichever of them has which set of experts, and so do
whole nodes: sets go where most of them are already, and experts that stay keep their
slot.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
from scipy.optimize import linear_sum_assignment

from moetuner.integrations.eplb.packing import busiest

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from moetuner.integrations.eplb.packing import Shape

    Floats = NDArray[np.float64]
    Integers = NDArray[np.int64]


def with_few_moves(
    new_LP: Integers, old_LP: Integers, load_LE: Floats, shape: Shape
) -> Integers:
    """The new map, its ranks and slots arranged like the old one's.

    A layer keeps the old map where that holds every expert and is as balanced.
    """
    result = np.empty_like(new_LP)
    num_experts = load_LE.shape[1]
    whole = np.array(
        [
            len(np.unique(row[row >= 0])) == num_experts and row.min() >= 0
            for row in old_LP
        ]
    )
    keeps = whole.copy()
    if whole.any():
        now = busiest(old_LP[whole], load_LE[whole], shape)
        keeps[whole] = now <= busiest(new_LP[whole], load_LE[whole], shape)
    for layer, (new, old) in enumerate(zip(new_LP, old_LP, strict=True)):
        result[layer] = old if keeps[layer] else _arranged(new, old, shape, num_experts)
    return result


def _arranged(new: Integers, old: Integers, shape: Shape, num_experts: int) -> Integers:
    news, olds = (row.reshape(shape.num_ranks, -1) for row in (new, old))
    shared = _held(news, num_experts) @ _held(olds, num_experts).T
    place = np.empty(shape.num_ranks, np.int64)
    size = shape.ranks_per_node
    blocks = shared.reshape(shape.num_nodes, size, shape.num_nodes, size)
    kept = np.empty((shape.num_nodes, shape.num_nodes))
    inside = {}
    for mine in range(shape.num_nodes):
        for theirs in range(shape.num_nodes):
            block = blocks[mine, :, theirs]
            rows, columns = linear_sum_assignment(block, maximize=True)
            inside[mine, theirs] = columns
            kept[mine, theirs] = block[rows, columns].sum()
    for node, at in enumerate(linear_sum_assignment(kept, maximize=True)[1].tolist()):
        first = node * size
        place[first : first + size] = at * size + inside[node, at]
    arranged = np.empty_like(news)
    for rank, at in enumerate(place):
        arranged[at] = _in_slots(news[rank], olds[at])
    return arranged.ravel()


def _held(slots_GS: Integers, num_experts: int) -> Floats:
    """Which rank holds which expert, 0.0 or 1.0 [G, E]."""
    held = np.zeros((len(slots_GS), num_experts + 1))
    held[np.arange(len(slots_GS))[:, None], slots_GS] = 1.0  # -1 is the last column
    return held[:, :num_experts]


def _in_slots(new: Integers, old: Integers) -> Integers:
    """The same experts, those that the rank has already in the slots they are in."""
    left = list(new)
    row = np.full(len(new), -1, np.int64)
    for slot, expert in enumerate(old):
        if expert in left:
            row[slot] = expert
            left.remove(expert)
    row[row < 0] = left
    return row
