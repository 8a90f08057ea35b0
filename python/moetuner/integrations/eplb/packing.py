"""Even loads by the published greedy, all layers at once, and swaps that improve on it.

1. groups of experts are packed onto nodes, heaviest first, equally many on each;
2. inside a node the expert with the highest load per replica gets one more, until all
   slots are filled;
3. replicas are packed onto the node's ranks, heaviest first, equally many on each;
4. the heaviest rank swaps a replica with another one, as long as the heavier of the two
   gets lighter (not in the published algorithm).

Legend: X rows (layers, or layers and nodes), L layers, E experts, G ranks, S slots.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Floats = NDArray[np.float64]
    Integers = NDArray[np.int64]

MAX_SWAPS = 64
"""Of a row; most have found their best after a dozen."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Shape:
    """Sizes that divide each other: slots by ranks by nodes, groups by nodes."""

    num_slots: int
    num_groups: int
    num_nodes: int
    num_ranks: int

    @property
    def ranks_per_node(self) -> int:
        """Ranks of one node."""
        return self.num_ranks // self.num_nodes


def balanced_slots(load_LE: Floats, shape: Shape) -> Integers:
    """Expert of each slot int64 [L, P], rank by rank."""
    groups = load_LE.reshape(len(load_LE), shape.num_groups, -1).sum(axis=2)
    node_of_group = pack(groups, shape.num_nodes)
    best = _slots_of_nodes(load_LE, node_of_group, shape)
    if 1 < shape.num_nodes < shape.num_groups:
        other = _slots_of_nodes(load_LE, _swapped(groups, node_of_group, shape), shape)
        better = busiest(other, load_LE, shape) < busiest(best, load_LE, shape)
        best[better] = other[better]
    return best


def busiest(slots_LP: Integers, load_LE: Floats, shape: Shape) -> Floats:
    """Load of the fullest rank of each layer; replicas share theirs evenly."""
    count = np.stack([np.bincount(r, minlength=load_LE.shape[1]) for r in slots_LP])
    each = np.take_along_axis(load_LE / np.maximum(count, 1), slots_LP, axis=1)
    most: Floats = each.reshape(len(each), shape.num_ranks, -1).sum(axis=2).max(axis=1)
    return most


def pack(weight_Xn: Floats, num_packs: int) -> Integers:
    """The pack of each item int64 [X, n], equally many in each, heaviest item first.

    One item for each pack stays in the order given, as published.
    """
    rows, items = weight_Xn.shape
    if items == num_packs:
        return np.tile(np.arange(num_packs), (rows, 1))
    most = items // num_packs
    packs = np.empty((rows, items), np.int64)
    sums = np.zeros((rows, num_packs))
    sizes = np.zeros((rows, num_packs), np.int64)
    every = np.arange(rows)
    # float32, as published: with it, ties are the same ones.
    order = np.argsort(-weight_Xn.astype(np.float32), axis=1, kind="stable")
    for item in order.T:
        lightest = np.where(sizes < most, sums, np.inf).argmin(axis=1)
        packs[every, item] = lightest
        sums[every, lightest] += weight_Xn[every, item]
        sizes[every, lightest] += 1
    return packs


def replicate(load_Xe: Floats, num_slots: int) -> Integers:
    """Replicas of each expert int64 [X, e]: one more for the highest load of each."""
    count = np.ones(load_Xe.shape, np.int64)
    every = np.arange(len(count))
    for _ in range(num_slots - load_Xe.shape[1]):
        count[every, (load_Xe / count).argmax(axis=1)] += 1
    return count


def swap(table_XGS: Floats, max_swaps: int = MAX_SWAPS) -> Integers:
    """Where each item comes from, int64 [X, G, S], after swaps of the fullest rank.

    Items are moved by value: ``table.reshape(X, -1)`` taken at the result is the table
    after the swaps.
    """
    rows, ranks, slots = table_XGS.shape
    origin = np.tile(np.arange(ranks * slots).reshape(ranks, slots), (rows, 1, 1))
    table = np.array(table_XGS)
    active = np.arange(rows)
    for _ in range(max_swaps if ranks > 1 else 0):
        part = table[active]
        sums = part.sum(axis=2)
        every = np.arange(len(active))
        top = sums.argmax(axis=1)
        heavy = sums[every, top]
        # What the fullest rank gives, less what it gets for it.
        given = part[every, top][:, None, :, None] - part[:, :, None, :]
        left = heavy[:, None, None, None] - given
        other = sums[:, :, None, None] + given
        worse = np.maximum(left, other).reshape(len(active), -1)
        chosen = worse.argmin(axis=1)
        gains = worse[every, chosen] < heavy * (1 - 1e-12)
        if not gains.any():
            break
        active, top, chosen = active[gains], top[gains], chosen[gains]
        rank, mine, theirs = np.unravel_index(chosen, (ranks, slots, slots))
        for array in (table, origin):
            array[active, top, mine], array[active, rank, theirs] = (
                array[active, rank, theirs].copy(),
                array[active, top, mine].copy(),
            )
    return origin


def _swapped(groups: Floats, node_of_group: Integers, shape: Shape) -> Integers:
    """Nodes of groups after swaps between the fullest node and others."""
    order = np.argsort(node_of_group, axis=1, kind="stable")
    table = np.take_along_axis(groups, order, axis=1)
    table = table.reshape(len(groups), shape.num_nodes, -1)
    moved = np.take_along_axis(order, swap(table).reshape(len(groups), -1), axis=1)
    nodes = np.empty_like(node_of_group)
    per_node = shape.num_groups // shape.num_nodes
    places = np.repeat(np.arange(shape.num_nodes), per_node)
    np.put_along_axis(nodes, moved, np.tile(places, (len(groups), 1)), axis=1)
    return nodes


def _slots_of_nodes(load: Floats, node_of_group: Integers, shape: Shape) -> Integers:
    """Steps 2 to 4, with the nodes of groups as given."""
    layers, num_experts = load.shape
    size = num_experts // shape.num_groups
    order = np.argsort(node_of_group, axis=1, kind="stable")
    experts = (order[:, :, None] * size + np.arange(size)).reshape(layers, -1)
    # A row for each layer and node.
    rows = layers * shape.num_nodes
    part = np.take_along_axis(load, experts, axis=1).reshape(rows, -1)
    num_slots = shape.num_slots // shape.num_nodes
    count = replicate(part, num_slots)
    chosen = _repeated(count, num_slots)
    each = np.take_along_axis(part / count, chosen, axis=1)
    ranks = shape.ranks_per_node
    order = np.argsort(pack(each, ranks), axis=1, kind="stable")
    table = np.take_along_axis(each, order, axis=1).reshape(rows, ranks, -1)
    order = np.take_along_axis(order, swap(table).reshape(rows, -1), axis=1)
    placed = np.take_along_axis(chosen, order, axis=1)
    experts = experts.reshape(rows, -1)
    slots: Integers = np.take_along_axis(experts, placed, axis=1)
    return slots.reshape(layers, -1)


def _repeated(count_Xe: NDArray[np.integer[Any]], num_slots: int) -> Integers:
    """Each expert as often as it has replicas, int64 [X, slots], in order."""
    rows = len(count_Xe)
    flat = np.repeat(np.tile(np.arange(count_Xe.shape[1]), rows), count_Xe.ravel())
    return flat.reshape(rows, num_slots)
