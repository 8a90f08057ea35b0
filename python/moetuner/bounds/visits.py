"""How many groups sets of items visit at least, as a linear function of pairs.

Each set takes the best rule of `moetuner.bounds.touches` by a guess of who is together;
which rule is taken for which set is free, every choice is a valid bound.

Legend: T sets, w longest set, n items, k items of a set, p = k (k - 1) / 2 pairs.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from moetuner.bounds.touches import Touches

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Floats = NDArray[np.float64]
    Ordered = list[tuple[int, NDArray[np.int64]]]
    """(k, cells of Y, flat [T, p]) of the sets of each size."""

_CHUNK = 8192
"""Sets at a time: their tables stay in the cache."""
_SAMPLE = 500
"""Sets that new rules are made for are among so many, evenly chosen."""


@dataclass(kw_only=True, slots=True, eq=False)
class RuleBook:
    """`Touches` by (size, groups, capacity): what one search learnt serves the next."""

    books: dict[tuple[int, int, int], Touches] = field(default_factory=dict)

    def of(self, size: int, num_groups: int, capacity: int) -> Touches:
        """Rules for sets of `size`."""
        capacity, num_groups = min(capacity, size), min(num_groups, size)
        key = (size, num_groups, capacity)
        if key not in self.books:
            self.books[key] = Touches(
                size=size, num_groups=num_groups, capacity=capacity
            )
        return self.books[key]


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Visits:
    """Weighted sets; what counts is the number of groups visited, less ``free``.

    Parameters
    ----------
    items
        int [T, w], distinct items of each set, -1 where there is none.
    weight
        Seconds per visited group, for every set.
    free
        Groups of each set that cost nothing: 0, or 1 for the home.
    """

    items: NDArray[np.integer[Any]]
    weight: float
    free: int

    def order(self, together: NDArray[np.floating]) -> Ordered:
        """Pairs of the sets by their size, as a guess [n, n] of who is together has it.

        Rules learnt from one set fit another when items of like company stand alike.
        """
        sizes = (self.items >= 0).sum(axis=1)
        ordered = []
        for size in np.unique(sizes[sizes > 0]).tolist():
            of_size = self.items[sizes == size]
            sets = of_size[of_size >= 0].reshape(-1, size)
            chunks = range(0, len(sets), _CHUNK)
            cells = [_cells(sets[i : i + _CHUNK], together) for i in chunks]
            ordered.append((size, np.concatenate(cells)))
        return ordered

    def kept(
        self,
        num_groups: int,
        capacity: int,
        together: NDArray[np.floating],
        book: RuleBook,
        learn: bool = False,
        ordered: Ordered | None = None,
    ) -> tuple[float, Floats]:
        """(constant, K): sum of weight * (visited - free) >= constant - <K, Y>.

        Parameters
        ----------
        num_groups, capacity
            Groups P, items that one group can hold of a set.
        together
            float [n, n], how likely pairs share a group: only the choice of rules
            depends on it.
        book
            Rules to choose from.
        learn
            Whether to make new rules for some sets of each size.
        ordered
            What `order` said of an earlier guess: it changes little, and costs time.
        """
        flat, n = together.ravel(), len(together)
        ordered = self.order(together) if ordered is None else ordered
        constant = -float(self.free) * sum(len(cells) for _, cells in ordered)
        pairs_kept = np.zeros(n * n)
        for size, of_size in ordered:
            rules = book.of(size, num_groups, capacity)
            if learn:
                some = of_size[:: max(len(of_size) // _SAMPLE, 1)]
                rules.learn(flat.take(some))
            for start in range(0, len(of_size), _CHUNK):
                cells = of_size[start : start + _CHUNK]
                chosen = rules.best(flat.take(cells))
                constant += float(chosen[:, 0].sum())
                pairs_kept += np.bincount(
                    cells.ravel(), -chosen[:, 1:].ravel(), minlength=n * n
                )
        kept = pairs_kept.reshape(n, n) * (self.weight / 2)
        return constant * self.weight, kept + kept.T


def _cells(
    sets: NDArray[np.integer[Any]], together: NDArray[np.floating]
) -> NDArray[np.int64]:
    """Cells of Y, flat, [T, p], the most sociable items first."""
    flat, n = together.ravel(), len(together)
    sets = sets.astype(np.int64)
    first, second = np.triu_indices(sets.shape[1], 1)
    chances = flat.take(sets[:, first] * n + sets[:, second])
    ends = np.zeros((first.size, sets.shape[1]), chances.dtype)
    ends[np.arange(first.size), first] = ends[np.arange(first.size), second] = 1
    order = np.argsort(-(chances @ ends), axis=1, kind="stable")
    sets = np.take_along_axis(sets, order, axis=1)
    return sets[:, first] * n + sets[:, second]
