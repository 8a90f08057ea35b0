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

_PASSES = 2
"""Searches for a bound; the lines of `Visits` are chosen anew before each."""


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
    constant, weight
        Seconds, and seconds per pair, symmetric float64 [n, n].
    visits
        Sets with the block-0 capacity of one group.
    together
        float64 [n, n], a guess of Y (that of a known placement), or None.
    """

    name: str
    least: float
    groups: Groups | None = None
    constant: float = 0.0
    weight: Floats | None = None
    visits: tuple[Visits, ...] = ()
    together: Floats | None = None

    def bound(self, deadline: float, max_iterations: int) -> float:
        """Best lower bound found until ``time.time()`` is `deadline`, in seconds."""
        if self.groups is None:
            return self.least
        best, guess = self.least, self._guess()
        for attempt in range(_PASSES):
            began = time.time()
            until = began + max(deadline - began, 0) / (_PASSES - attempt)
            constant, weight = self._linear(guess)
            search = KeptWeight(weight=weight, groups=self.groups)
            search.quick()
            search.improve(until, max_iterations)
            best = max(best, constant - search.bound)
            if search.shared is None or not self.visits:
                break
            guess = search.shared.astype(np.float64)
        return best

    def _guess(self) -> Floats:
        if self.together is not None:
            return self.together
        assert self.groups is not None
        n = self.groups.num_items
        return np.full((n, n), 1 / self.groups.num_groups) + np.eye(n)

    def _linear(self, guess: Floats) -> tuple[float, Floats]:
        """(constant, K) with every choice of lines made by `guess`."""
        assert self.groups is not None
        n, constant = self.groups.num_items, self.constant
        weight = np.zeros((n, n)) if self.weight is None else self.weight.copy()
        for visits in self.visits:
            more, kept = visits.kept(
                n, self.groups.num_groups, self.groups.kappa, guess
            )
            constant += more
            weight += kept
        return constant, weight
