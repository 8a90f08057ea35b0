"""Placements of one layer, all or up to names, and renamings that change nothing.

Legend: E experts, G ranks.
"""

from __future__ import annotations

import itertools
import math
from typing import TYPE_CHECKING

import numpy as np

from moetuner.errors import SolverError

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from moetuner.placement.topology import Topology
    from moetuner.problem import PlacementProblem

_MAX_CELLS = 200_000
"""Ranks of a layer's experts, legal or not, that are looked at."""


def partitions(
    num_experts: int, topology: Topology, slots: int, limit: int
) -> NDArray[np.int32]:
    """Each placement of E experts with at most ``slots`` on a rank, once.

    Placements that differ by the names of ranks in a node, or of nodes, count as one.

    Returns
    -------
    int32 [states, E], the rank of each expert; ranks and nodes are named in the order
    in which the experts open them.

    Raises
    ------
    SolverError
        When there are more than `limit`.
    """
    per_node, num_ranks = topology.ranks_per_node, topology.num_ranks
    states: list[list[int]] = []
    rank_of: list[int] = []
    sizes = [0] * num_ranks

    def place(expert: int) -> None:
        if expert == num_experts:
            if len(states) == limit:
                raise SolverError(
                    f"solver exact: more than {limit} ways to place {num_experts} "
                    f"experts on {num_ranks} ranks"
                )
            states.append(rank_of.copy())
            return
        for rank in range(num_ranks):
            first = rank - rank % per_node
            opened = all(sizes[first:rank])  # ranks of a node open in order
            node_opened = not first or sizes[first - per_node]  # so do nodes
            if opened and node_opened and sizes[rank] < slots:
                sizes[rank] += 1
                rank_of.append(rank)
                place(expert + 1)
                rank_of.pop()
                sizes[rank] -= 1

    place(0)
    return np.array(states, np.int32)


def renamings(
    topology: Topology, limit: int, *, alike: bool = False
) -> NDArray[np.int32]:
    """Every new naming of ranks that keeps nodes together, int32 [renamings, G].

    With ``alike``, ranks are named in the same order in all nodes: rows that enter a
    node at the rank with their sender's place do so after it too.

    Raises
    ------
    SolverError
        When there are more than `limit`.
    """
    per_node, num_nodes = topology.ranks_per_node, topology.num_nodes
    count = math.factorial(num_nodes) * math.factorial(per_node) ** num_nodes
    if count > limit:
        raise SolverError(
            f"solver exact: {count} ways to name {topology.num_ranks} ranks, at most "
            f"{limit} are tried"
        )
    inside = list(itertools.permutations(range(per_node)))
    names = [
        [
            node * per_node + i
            for node, locals_ in zip(nodes, order, strict=True)
            for i in locals_
        ]
        for nodes in itertools.permutations(range(num_nodes))
        for order in itertools.product(inside, repeat=num_nodes)
        if not alike or len(set(order)) == 1
    ]
    return np.array(names, np.int32)


def one_of_each(
    states: NDArray[np.int32], names: NDArray[np.int32]
) -> NDArray[np.int32]:
    """One of the rows of `states` [P, E] for all that `names` [R, G] make alike."""
    digits = names.shape[1] ** np.arange(states.shape[1], dtype=np.int64)
    key = np.full(len(states), np.iinfo(np.int64).max)
    for new in names.astype(np.int64):
        key = np.minimum(key, new[states] @ digits)
    found: NDArray[np.int32] = states[np.unique(key, return_index=True)[1]]
    return found


def legal_layers(problem: PlacementProblem) -> NDArray[np.int32] | None:
    """All legal ranks of one layer's experts, int32 [states, E]; None: too many."""
    num_experts, num_ranks = problem.num_experts, problem.topology.num_ranks
    if num_ranks**num_experts > _MAX_CELLS:
        return None
    cells = np.indices((num_ranks,) * num_experts).reshape(num_experts, -1).T
    sizes = (cells[:, :, None] == np.arange(num_ranks)).sum(axis=1)
    legal = (sizes <= problem.slots_per_rank).all(axis=1)
    states: NDArray[np.int32] = cells[legal].astype(np.int32)
    return states
