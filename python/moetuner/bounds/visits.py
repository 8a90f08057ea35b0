"""How many groups a set of items visits at least, as a linear function of pairs.

A set of k items in d groups has at most as many pairs in different groups as the
Turan graph T(k, d). So (pairs cut, groups visited) lies above the convex lower hull of
the points (|T(k, d)|, d), d = 1..P: each of its lines is a valid lower bound

    visited >= intercept + slope * cut,      cut = k (k - 1) / 2 - pairs kept together

and which line is taken for which set is free; the best one depends on the cut that one
expects. Lines with few groups are left out where the set cannot fit into them.

Legend: T sets, w longest set, n items.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING, Any

import numpy as np
from scipy.sparse import csr_array

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Floats = NDArray[np.float64]


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

    def kept(
        self, num_items: int, num_groups: int, capacity: int, together: Floats
    ) -> tuple[float, Floats]:
        """(constant, K): sum of weight * (visited - free) >= constant - <K, Y>.

        Parameters
        ----------
        num_items, num_groups, capacity
            Items n, groups P, items that one group can hold of a set.
        together
            float64 [n, n], how likely pairs share a group: only the choice of lines
            depends on it.
        """
        sizes = (self.items >= 0).sum(axis=1)
        member = self._incidence(num_items)
        # Pairs kept, by the guess: s' Y s, less the items themselves.
        guess = (member @ together) * member
        pairs = (np.asarray(guess.sum(axis=1)).ravel() - sizes) / 2
        constant, slopes = 0.0, np.zeros(len(sizes))
        for size in np.unique(sizes[sizes > 0]).tolist():
            of_size = sizes == size
            lines = visit_lines(size, num_groups, capacity)
            total = size * (size - 1) / 2
            values = lines[:, 0] + lines[:, 1] * (total - pairs[of_size])[:, None]
            chosen = lines[values.argmax(axis=1)]
            constant += float((chosen[:, 0] + chosen[:, 1] * total - self.free).sum())
            slopes[of_size] = chosen[:, 1]
        weighted = member.multiply(np.sqrt(slopes)[:, None]).tocsr()
        pairs_kept = (weighted.T @ weighted).toarray() * (self.weight / 2)
        np.fill_diagonal(pairs_kept, 0)
        return constant * self.weight, pairs_kept

    def _incidence(self, num_items: int) -> csr_array:
        there = self.items >= 0
        rows = np.repeat(np.arange(len(self.items)), there.sum(axis=1))
        columns = self.items[there].astype(np.int64)
        shape = (len(self.items), num_items)
        return csr_array((np.ones(len(rows)), (rows, columns)), shape=shape)


@cache
def visit_lines(size: int, num_groups: int, capacity: int) -> Floats:
    """Lines (intercept, slope) of the hull for sets of `size`, float64 [lines, 2]."""
    most = min(size, num_groups)
    least = min(-(-size // capacity), most)
    points = [(turan_pairs(size, groups), groups) for groups in range(least, most + 1)]
    hull: list[tuple[int, int]] = []
    for point in points:
        while len(hull) > 1 and _above(hull[-2], hull[-1], point):
            hull.pop()
        hull.append(point)
    lines = [(float(least), 0.0)]
    for (cut, groups), (more_cut, more) in itertools.pairwise(hull):
        slope = (more - groups) / (more_cut - cut)
        lines.append((groups - slope * cut, slope))
    return np.array(lines)


def turan_pairs(size: int, num_groups: int) -> int:
    """Most pairs in different groups that `size` items in `num_groups` can have."""
    small, extra = divmod(size, num_groups)
    kept = num_groups * small * (small - 1) // 2 + extra * small
    return size * (size - 1) // 2 - kept


def _above(a: tuple[int, int], b: tuple[int, int], c: tuple[int, int]) -> bool:
    """Whether `b` is on or above the line from `a` to `c`."""
    return (b[1] - a[1]) * (c[0] - a[0]) >= (c[1] - a[1]) * (b[0] - a[0])
