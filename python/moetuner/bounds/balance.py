"""Bounds that need no search: what the fullest of equal groups holds at least.

Legend: Q batches, L layers, E experts, P groups (ranks or nodes).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components

from moetuner.evaluation.workload import num_batches

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Floats = NDArray[np.float64]


def fullest_group(rows: Floats, num_groups: int, slots: int, spare: int) -> Floats:
    """Rows that the fullest group computes at least, [..., E] -> [...].

    - the mean over groups;
    - the heaviest expert, shared by as many slots as can be spared for it;
    - without spare slots: the heaviest expert has ``slots - 1`` companions, at best the
      lightest; and of the j P + 1 heaviest experts some group holds j + 1.

    Parameters
    ----------
    rows
        float64 [..., E], rows of each expert.
    num_groups, slots
        Groups P, and experts that one holds at most.
    spare
        Slots over all groups beyond one per expert that may hold replicas.
    """
    falling = -np.sort(-rows, axis=-1)
    best = np.maximum(
        rows.sum(axis=-1) / num_groups,
        falling[..., 0] / min(1 + spare, num_groups),
    )
    if spare:
        return np.asarray(best)
    empty = num_groups * slots - rows.shape[-1]
    companions = max(slots - 1 - empty, 0)
    tail = falling[..., falling.shape[-1] - companions :].sum(axis=-1)
    if companions < rows.shape[-1]:
        best = np.maximum(best, falling[..., 0] + tail)
    for j in range(1, min(slots, -(-rows.shape[-1] // num_groups))):
        if j * num_groups < rows.shape[-1]:
            end = j * num_groups + 1
            best = np.maximum(best, falling[..., end - j - 1 : end].sum(axis=-1))
    return np.asarray(best)


def least_remote(rows: Floats, num_groups: int, spare: int) -> Floats:
    """Rows that do not find a replica in their home's group, [..., E] -> [...].

    Homes are uniform over the P groups; an expert with r replicas in different groups
    is at home for r / P of its rows. The heaviest experts get the replicas.
    """
    share = np.full(rows.shape[-1], 1 / num_groups)
    for i in range(rows.shape[-1]):
        extra = min(num_groups - 1, spare)
        share[i] += extra / num_groups
        spare -= extra
    falling = -np.sort(-rows, axis=-1)
    return np.asarray((falling * (1 - share)).sum(axis=-1))


def cannot_stay_together(
    ids: NDArray[np.int16], batches: NDArray[np.int32], num_experts: int, capacity: int
) -> NDArray[np.bool_]:
    """Batches in which some token leaves its group, whatever the placement, bool [Q].

    If no token of a batch left its group, all experts that tokens tie together would
    be in one group; more than `capacity` of them cannot be. ``ids`` is [T, K].
    """
    count = num_batches(batches)
    known = ids >= 0
    first = np.argmax(known, axis=1)
    anchor = ids[np.arange(len(ids)), first].astype(np.int64)
    token, choice = np.nonzero(known)
    offset = batches[token].astype(np.int64) * num_experts
    size = count * num_experts
    links = coo_array(
        (
            np.ones(token.size, bool),
            (offset + anchor[token], offset + ids[token, choice]),
        ),
        shape=(size, size),
    )
    _, label = connected_components(links, directed=False)
    largest = np.bincount(label)[label].reshape(count, num_experts).max(axis=1)
    return np.asarray(largest > capacity)
