"""Clusters of free size, as the paper prints them, and its memory row.

The paper's row (13) bounds what a rank holds over all layers; it couples layers that
nothing else couples. Here it has slack, and is kept by renaming clusters and, where
that is not enough, by equal ones: a heuristic.

Legend: L layers, E experts, G ranks.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

import moetuner._core as _core
from moetuner.errors import InvalidPlacementError
from moetuner.placement.model import contiguous_rank_of

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from moetuner.problem import PlacementProblem


def memory_excess(sizes: NDArray[np.int64]) -> int:
    """Experts by which a rank's total misses its share, rounded up.

    The total is over all layers; `sizes` is int64 [L, G].
    """
    num_ranks = sizes.shape[1]
    totals = sizes.sum(axis=0) * num_ranks
    return int(-(-np.abs(totals - sizes.sum()).max() // num_ranks))


def check_sizes(sizes: NDArray[np.int64], slack: int | None) -> None:
    """Refuse `sizes` [L, G] with an idle rank, or outside the memory row."""
    if sizes.min() < 1:
        raise InvalidPlacementError("placement leaves a rank without experts")
    if slack is not None and memory_excess(sizes) > slack:
        raise InvalidPlacementError(
            f"placement's ranks hold {sizes.sum(axis=0).tolist()} experts over all "
            f"layers, {memory_excess(sizes)} off an equal share; memory_slack is "
            f"{slack}"
        )


def within_memory(
    problem: PlacementProblem, rank_of: NDArray[np.int32], slack: int | None
) -> NDArray[np.int32]:
    """`rank_of` [L, E] with clusters renamed so that the memory row holds.

    Where it holds already nothing changes. Where names alone cannot do it, the layers
    with the most uneven clusters get equal ones, swapped for balance.
    """

    def holds() -> bool:
        return slack is None or memory_excess(problem.rank_sizes(rank_of)) <= slack

    if holds():
        return rank_of
    num_ranks = problem.topology.num_ranks
    rank_of = even_out_sizes(rank_of, num_ranks)
    blocks = contiguous_rank_of(1, problem.num_experts, num_ranks)[0]
    load = problem.relative_load()
    for layer in np.argsort(-np.ptp(problem.rank_sizes(rank_of), axis=1)):
        if holds():
            break
        rank_of[layer] = _core.refine_by_swaps(load[layer], blocks, num_ranks)
        rank_of = even_out_sizes(rank_of, num_ranks)
    return rank_of


def even_out_sizes(
    rank_of: NDArray[np.integer[Any]], num_ranks: int
) -> NDArray[np.int32]:
    """Rename the clusters of each layer so that ranks hold about equally many experts.

    Layer by layer the largest cluster goes to the rank with the fewest so far; loads
    within a layer do not change.
    """
    totals = np.zeros(num_ranks, np.int64)
    renamed = np.empty(rank_of.shape, np.int32)
    for row, ranks in zip(renamed, rank_of, strict=True):
        sizes = np.bincount(ranks, minlength=num_ranks)
        clusters = np.argsort(-sizes, kind="stable")
        emptiest = np.argsort(totals, kind="stable")
        new_rank = np.empty(num_ranks, np.int32)
        new_rank[clusters] = emptiest
        row[:] = new_rank[ranks]
        totals[emptiest] += sizes[clusters]
    return renamed
