"""One share of the objective: experts of one layer, or of two that touch.

Its least value is bounded in two ways, and the larger counts: by counting alone, and by
constant - (weight that any partition can keep together).

Legend: n items, P groups.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from moetuner.bounds.gram import Groups, KeptWeight

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from moetuner.bounds.visits import Visits

    Floats = NDArray[np.float64]


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Piece:
    """constant - <weight, Y> + sum of visits, over partitions Y; or at least ``least``.

    Parameters
    ----------
    name
        Which layers, for reports.
    least
        Seconds, by counting alone.
    groups
        What Y looks like; None when counting says all.
    options
        (constant, weight) in seconds, and seconds per pair, symmetric float64 [n, n];
        each gives a bound, the best one counts.
    visits
        Sets with the block-0 capacity of one group.
    together
        float64 [n, n], a guess of Y (that of a known placement), or None.
    """

    name: str
    least: float
    groups: Groups | None = None
    options: tuple[tuple[float, Floats], ...] = ()
    visits: tuple[Visits, ...] = ()
    together: Floats | None = None

    def bound(self, deadline: float, max_iterations: int) -> float:
        """Best lower bound found until ``time.time()`` is `deadline`, in seconds.

        Every option is searched once; the best one again, with the lines of `Visits`
        chosen anew.
        """
        if self.groups is None:
            return self.least
        first = self._guess()
        found = []
        for i, option in enumerate(self.options):
            left = max(deadline - time.time(), 0)
            until = time.time() + left / (len(self.options) - i + bool(self.visits))
            found.append((*self._search(option, first, until, max_iterations), option))
        best, shared, option = max(found, key=lambda each: each[0])
        if self.visits and shared is not None:
            again, _ = self._search(option, shared, deadline, max_iterations)
            best = max(best, again)
        return max(best, self.least)

    def _search(
        self,
        option: tuple[float, Floats],
        guess: Floats,
        until: float,
        max_iterations: int,
    ) -> tuple[float, Floats | None]:
        """(bound, Y of the relaxation) with every choice of lines made by `guess`."""
        assert self.groups is not None
        n, (constant, weight) = self.groups.num_items, option
        weight = weight.copy()
        for visits in self.visits:
            more, kept = visits.kept(
                n, self.groups.num_groups, self.groups.kappa, guess
            )
            constant += more
            weight += kept
        search = KeptWeight(weight=weight, groups=self.groups)
        search.quick()
        search.improve(until, max_iterations)
        shared = search.shared
        return constant - search.bound, (
            None if shared is None else shared.astype(np.float64)
        )

    def _guess(self) -> Floats:
        if self.together is not None:
            return self.together
        assert self.groups is not None
        n = self.groups.num_items
        return np.full((n, n), 1 / self.groups.num_groups) + np.eye(n)
