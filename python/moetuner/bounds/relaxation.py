"""Bounds by a relaxation over who shares a group: experts of a layer, or of two.

A piece of the objective is bounded in two ways, and the larger counts: by counting
alone, and by constant - (weight that any partition can keep together), see `gram`.

Legend: n items, P groups.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from moetuner.bounds.gram import Groups, KeptWeight
from moetuner.bounds.visits import RuleBook

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from moetuner.bounds.visits import Ordered, Visits

    Floats = NDArray[np.float64]


_ROUND = 5
"""Iterations between two choices of rules; the bound is evaluated less often."""
_TRIAL = 60
"""Iterations that every option is given."""
_LEARN_EVERY = 4
_DAMPING = 0.9
_SMALL_GAIN, _PATIENCE = 1e-5, 6
_MIX = 0.5


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class RelaxedPiece:
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

    @property
    def searched(self) -> bool:
        """Whether there is anything beyond counting."""
        return self.groups is not None

    def bound(
        self,
        deadline: float,
        max_iterations: int,
        book: RuleBook | None = None,
        last: float | None = None,
    ) -> float:
        """Best lower bound found until ``time.time()`` is `deadline`, in seconds.

        Every option is searched a little, the best one then to the end. That with
        visits goes on until `last`, where that is later, unless it has found more than
        counting: what ends below has proven nothing. What `book` has learnt from other
        pieces is a help, never a condition.
        """
        if self.groups is None:
            return self.least
        book = RuleBook() if book is None else book
        last = deadline if last is None else max(last, deadline)
        searches = [_Search(self, option, book, last) for option in self.options]
        for i, search in enumerate(searches if len(searches) > 1 else []):
            left = max(deadline - time.time(), 0) / (len(searches) - i + 1)
            search.run(time.time() + left, min(_TRIAL, max_iterations))
        best = max(searches, key=lambda search: search.best)
        best.run(deadline, max_iterations)
        return max(best.best, self.least)

    def guess(self) -> Floats:
        """Pairs as in the known placement, half; as in a random one, half."""
        assert self.groups is not None
        n, chance = self.groups.num_items, 1 / self.groups.num_groups
        random = np.full((n, n), chance) + (1 - chance) * np.eye(n)
        return random if self.together is None else (random + self.together) / 2


class _Search:
    """One option of a piece: rules of `Visits` and the relaxation's Y in turn.

    Rules are the best ones for a guess of Y; the guess follows the Y that answers them,
    damped ever more, while the relaxation goes on from where it stands.
    """

    def __init__(
        self,
        piece: RelaxedPiece,
        option: tuple[float, Floats],
        book: RuleBook,
        last: float,
    ) -> None:
        assert piece.groups is not None
        self.piece, self.option, self.book, self.last = piece, option, book, last
        self.guess, self.rounds, self.stale = piece.guess().astype(np.float32), 0, 0
        self.ordered: list[Ordered] = []
        self.constant, weight = self._weigh()
        self.relaxation = KeptWeight(weight=weight, groups=piece.groups)
        self.best = self.constant - self.relaxation.quick()
        self.known = max(self.best, piece.least)  # without any search

    def run(self, until: float, max_iterations: int) -> None:
        """Go on until ``time.time()`` is `until`, or nothing is gained any more."""
        relaxation = self.relaxation
        if not self.piece.visits:
            relaxation.improve(until, max_iterations)
            self.best = self.constant - relaxation.bound
            return
        while (
            relaxation.iterations < max_iterations
            and time.time() < (limit := self._limit(until))
            and self.stale < _PATIENCE
        ):
            relaxation.improve(limit, relaxation.iterations + _ROUND)
            if np.isfinite(relaxation.bound):
                found = self.constant - relaxation.bound
                gained = found > self.best + _SMALL_GAIN * abs(self.best)
                self.stale = 0 if gained else self.stale + 1
                self.best = max(self.best, found)
            self.rounds += 1
            if relaxation.shared is None:
                return
            step = (relaxation.shared - self.guess) / (1 + self.rounds) ** _DAMPING
            self.guess = self.guess + step
            constant, weight = self._weigh()
            mix = (2 / (2 + self.rounds)) ** _MIX
            self.constant += mix * (constant - self.constant)
            relaxation.reweigh(relaxation.weight + mix * (weight - relaxation.weight))

    def _limit(self, until: float) -> float:
        """When to end: `until`, if there is anything to show for it."""
        return until if self.best > self.known else self.last

    def _weigh(self) -> tuple[float, Floats]:
        """(constant, K) with every choice of rules made by the guess."""
        groups, (constant, weight) = self.piece.groups, self.option
        assert groups is not None
        weight = weight.copy()
        learn = self.rounds % _LEARN_EVERY == 0
        if learn:
            self.ordered = [visits.order(self.guess) for visits in self.piece.visits]
        for visits, ordered in zip(self.piece.visits, self.ordered, strict=True):
            more, kept = visits.kept(
                *(groups.num_groups, groups.kappa, self.guess),
                book=self.book,
                learn=learn,
                ordered=ordered,
            )
            constant += more
            weight += kept
        return constant, weight
