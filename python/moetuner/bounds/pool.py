"""Pieces of a bound, side by side in child processes: see `moetuner._workers`."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import TYPE_CHECKING

from moetuner._workers import Ended, Outcome, run_tasks
from moetuner.bounds.visits import RuleBook

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from moetuner.bounds.priced_sets import PricedSets
    from moetuner.bounds.relaxation import RelaxedPiece

_GRACE = 5.0
"""Seconds: a child that is stuck in one decomposition is not waited for."""


@dataclass(frozen=True, kw_only=True, slots=True)
class PieceTask:
    """What a child gets."""

    piece: RelaxedPiece | PricedSets
    max_iterations: int
    last: float
    """When all ends, by ``time.time()``."""


class PieceBounder:
    """In a child: bounds pieces, with what it has learnt from those before."""

    def __init__(self) -> None:
        self.book = RuleBook()

    def __call__(self, task: PieceTask, until: float, _: object) -> float:
        """Best lower bound of the piece found until `time.time` is `until`, seconds."""
        return task.piece.bound(until, task.max_iterations, self.book, task.last)


def bound_pieces(
    pieces: Sequence[RelaxedPiece | PricedSets],
    *,
    deadline: float,
    threads: int = 0,
    max_iterations: int = 2000,
    on_bound: Callable[[int, float], None] | None = None,
) -> list[float]:
    """Lower bound of each piece, found until ``time.monotonic()`` is `deadline`.

    Those that come first get their first bound even where time is short. A piece that
    nobody got to, or whose child died, keeps what counting says of it;
    the same after Ctrl-C, which goes no further.
    """
    bounds = [piece.least for piece in pieces]
    searched = [i for i, piece in enumerate(pieces) if piece.searched]

    def keep(number: int, outcome: Outcome) -> None:
        if outcome.ended is not Ended.DONE:
            return
        index = searched[number]
        bounds[index] = max(bounds[index], outcome.result)
        if on_bound:
            on_bound(index, bounds[index])

    last = time.time() + deadline - time.monotonic()
    run_tasks(
        f"{__name__}:{PieceBounder.__name__}",
        [
            PieceTask(piece=pieces[i], max_iterations=max_iterations, last=last)
            for i in searched
        ],
        deadline=deadline,
        threads=threads,
        grace=_GRACE,
        on_end=keep,
    )
    return bounds
