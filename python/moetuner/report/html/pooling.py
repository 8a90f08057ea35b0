"""Thousands of ranks on one page: neighbours are drawn as their mean."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Floats = NDArray[np.float64]

MAX_RANKS = 128


def rank_labels(num_ranks: int) -> list[str]:
    """Names of what `pooled` leaves: ranks, or runs of neighbouring ranks."""
    width = _width(num_ranks)
    if width == 1:
        return [str(rank) for rank in range(num_ranks)]
    return [f"{first}-{first + width - 1}" for first in range(0, num_ranks, width)]


def node_lines(num_ranks: int, ranks_per_node: int) -> list[int]:
    """Where nodes begin among what `pooled` leaves, without the first."""
    width = _width(num_ranks)
    if ranks_per_node % width:
        return []
    return list(
        range(ranks_per_node // width, num_ranks // width, ranks_per_node // width)
    )


def pooled(values: Floats, *axes: int) -> Floats:
    """`values` with at most `MAX_RANKS` ranks along each axis; NaN counts nowhere."""
    for axis in axes:
        width = _width(values.shape[axis])
        if width == 1:
            continue
        shape = list(values.shape)
        shape[axis : axis + 1] = [shape[axis] // width, width]
        parts = values.reshape(shape)
        known = np.isfinite(parts)
        count = known.sum(axis=axis + 1)
        total = np.where(known, parts, 0).sum(axis=axis + 1)
        values = np.where(count > 0, total / np.maximum(count, 1), np.nan)
    return values


def _width(num_ranks: int) -> int:
    """Ranks per group: the fewest that divide them and keep the page small."""
    least = -(-num_ranks // MAX_RANKS)
    return next(w for w in range(least, num_ranks + 1) if num_ranks % w == 0)
