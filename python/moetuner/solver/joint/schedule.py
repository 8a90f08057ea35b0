"""How long the rounds of a search are: ever longer, and the last as time allows."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from moetuner.solver.base import SolveStatus

if TYPE_CHECKING:
    from collections.abc import Callable

    from moetuner.placement.model import Placement
    from moetuner.solver.base import Clock
    from moetuner.solver.joint.interruptible import Interruptible

GROWTH = 4
"""A round has so many times the proposals of the one before it."""
SURE = 0.95
"""Share of the time left that the last round is made for."""
MOST_PROPOSALS = 10**9
_LEAST_SHARE = 0.7


class Rounds(Protocol):
    """A search in rounds, each of which may go several ways."""

    @property
    def placement(self) -> Placement:
        """The best found so far."""

    def round(self, proposals: int, seconds: float) -> bool:
        """Go every way that is open; whether anything is better now."""

    def settle(self) -> int:
        """Keep to the way that went best last time; of how many it is one."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Schedule:
    """Rounds until the time is up, or enough of them improved nothing.

    Which way is best shows only where all had the same length, and may change with it:
    all are gone until no longer round fits, the best one in the time that is left.

    Parameters
    ----------
    clock, runner
        Of the solve.
    max_rounds
        Rounds at most; 0: the clock decides.
    patience
        Rounds without improvement after which the search ends.
    report
        Called after each round with the number of rounds and whether it improved
        anything.
    """

    clock: Clock
    runner: Interruptible
    max_rounds: int
    patience: int
    report: Callable[[int, bool], None]

    def run(self, rounds: Rounds, proposals: int, share: float) -> SolveStatus:
        """Rounds in that share of the time left, the first of that many proposals."""
        idle = done = 0
        before = 0, 0.0
        end = self.clock.seconds + share * self.clock.left
        while idle < self.patience:
            if self.max_rounds and done >= self.max_rounds:
                break
            began = self.clock.seconds
            if began >= end:
                return SolveStatus.TIME_LIMIT
            better = rounds.round(proposals, end - began)
            done, idle = done + 1, 0 if better else idle + 1
            self.report(done, better)
            if self.runner.interrupted:
                return SolveStatus.INTERRUPTED
            took, left = self.clock.seconds - began, end - self.clock.seconds
            each = _seconds_each(proposals, took, *before)
            before = proposals, took
            longer = min(GROWTH * proposals, MOST_PROPOSALS)
            fits = proposals + (SURE * left - took) / each
            # The last one shall be by far the longest.
            if not self.max_rounds and fits < GROWTH * longer:
                of_one = SURE * left * rounds.settle()
                fits = proposals + (of_one - took) / each
                if 2 * fits < proposals:
                    return SolveStatus.TIME_LIMIT
                longer = int(fits)
            proposals = longer
        return SolveStatus.HEURISTIC


def _seconds_each(proposals: int, took: float, fewer: int, took_fewer: float) -> float:
    """What one more proposal takes, after a round and a shorter one before it.

    Beginning and ending take about as long in every round; a clock that was disturbed
    is believed in part.
    """
    mean = max(took, 1e-9) / proposals
    if not fewer or fewer >= proposals:
        return mean
    more = (took - took_fewer) / (proposals - fewer)
    return min(max(more, _LEAST_SHARE * mean), mean)
