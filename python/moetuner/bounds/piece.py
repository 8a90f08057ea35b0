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


_PASSES = 5
_SMALL_GAIN = 5e-4
_DAMPING = 0.8


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

        Every option is searched once, the best one then again and again: lines of
        `Visits` and the relaxation's Y answer each other, Y damped, until neither
        gains.
        """
        if self.groups is None:
            return self.least
        guess = self._guess()
        found = []
        for i, option in enumerate(self.options):
            left = max(deadline - time.time(), 0)
            until = time.time() + left / (len(self.options) - i + bool(self.visits))
            found.append((*self._search(option, guess, until, max_iterations), option))
        best, shared, option = max(found, key=lambda each: each[0])
        guess = shared if shared is not None else guess
        for attempt in range(1, _PASSES if self.visits else 1):
            left = max(deadline - time.time(), 0)
            if not left:
                break
            until = time.time() + left / (_PASSES - attempt)
            again, shared = self._search(option, guess, until, max_iterations)
            gained, best = again - best, max(best, again)
            if shared is None or gained < _SMALL_GAIN * abs(best):
                break
            guess = guess + (shared - guess) / (1 + attempt) ** _DAMPING
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
        """Pairs as in the known placement, half; as in a random one, half."""
        assert self.groups is not None
        n, chance = self.groups.num_items, 1 / self.groups.num_groups
        random = np.full((n, n), chance) + (1 - chance) * np.eye(n)
        return random if self.together is None else (random + self.together) / 2
