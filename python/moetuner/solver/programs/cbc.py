"""Integer programs with CBC, in child processes."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import TYPE_CHECKING

from moetuner._workers import Ended, Outcome, run_tasks
from moetuner.errors import MissingDependencyError
from moetuner.solver.base import SolveStatus

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    import numpy as np
    from numpy.typing import NDArray

    from moetuner.solver.programs.model import MilpModel

CUTOFF_INCREMENT = 1e-5
"""CBC passes over what improves its incumbent by less: bounds are lowered by this."""
_HANDLER = "moetuner.solver.programs.cbc_worker:Cbc"
# CBC looks at the clock between nodes; a child that is this late is not waited for.
_PATIENCE = 1.0
_STATUS = {
    "OPTIMAL": SolveStatus.OPTIMAL,
    "FEASIBLE": SolveStatus.TIME_LIMIT,
    "NO_SOLUTION_FOUND": SolveStatus.TIME_LIMIT,
}
_UNFINISHED = {
    Ended.LATE: SolveStatus.TIME_LIMIT,
    Ended.DIED: SolveStatus.FAILED,
    Ended.INTERRUPTED: SolveStatus.INTERRUPTED,
}


@dataclass(frozen=True, kw_only=True, slots=True)
class MilpResult:
    """What CBC found: ``x`` [n] or None, a proven bound or None, and in how long."""

    status: SolveStatus
    x: NDArray[np.float64] | None = None
    bound: float | None = None
    seconds: float = 0.0


@dataclass(frozen=True, kw_only=True, slots=True)
class MilpNews:
    """Where a program stands; ``ended``: there will be no more."""

    index: int
    incumbent: float | None
    bound: float | None
    ended: bool = False


@dataclass(frozen=True, kw_only=True, slots=True)
class MilpTask:
    """What a child gets."""

    model: MilpModel
    gap_absolute: float
    seed: int


def solve_milps(
    models: Sequence[MilpModel],
    *,
    time_limit: float,
    gap_absolute: float = 0.0,
    threads: int = 0,
    seed: int = 0,
    on_news: Callable[[MilpNews], None] | None = None,
) -> list[MilpResult]:
    """Solve independent programs side by side within one time limit.

    Parameters
    ----------
    models
        The programs; the time that one leaves over goes to those after it.
    time_limit
        Seconds for all of them together.
    gap_absolute
        Stop a program when value - bound is below this, or `CUTOFF_INCREMENT`.
    threads
        Children at a time; 0 means one per core.
    seed
        CBC's random seed.
    on_news
        Called when a program has news, and when it ends.

    Returns
    -------
    One result per program, in order. After Ctrl-C those that did not end have status
    `SolveStatus.INTERRUPTED`; the interrupt goes no further. One whose child died has
    `SolveStatus.FAILED`. A program that was cut off, or never begun, has no ``x``: CBC
    hands out nothing before it ends.

    Raises
    ------
    MissingDependencyError
        When a child cannot even load CBC; the message says why.
    """
    bounds: dict[int, float] = {}

    def hear(index: int, incumbent: float | None, bound: float | None) -> None:
        if bound is not None:
            bounds[index] = bound - CUTOFF_INCREMENT  # what CBC passes over
        if on_news:
            known = bounds.get(index)
            on_news(MilpNews(index=index, incumbent=incumbent, bound=known))

    def end(index: int, outcome: Outcome) -> None:
        result = _result(outcome, bounds.get(index))
        value = None if result.x is None else float(models[index].objective @ result.x)
        if on_news:
            on_news(
                MilpNews(index=index, incumbent=value, bound=result.bound, ended=True)
            )

    outcomes = run_tasks(
        _HANDLER,
        [MilpTask(model=m, gap_absolute=gap_absolute, seed=seed) for m in models],
        deadline=time.monotonic() + time_limit,
        threads=threads,
        patience=_PATIENCE,
        grace=_PATIENCE,
        on_news=lambda index, news: hear(index, *news),
        on_end=end,
    )
    return [_result(outcome, bounds.get(i)) for i, outcome in enumerate(outcomes)]


def _result(outcome: Outcome, bound: float | None) -> MilpResult:
    """What became of a program whose bound was known while CBC ran."""
    if outcome.ended is Ended.NOT_STARTED:
        why = outcome.last_words
        if "No module named 'mip'" in why:
            why += "; pip install 'moetuner[cbc]'"
        raise MissingDependencyError(f"solver: CBC does not start here: {why}")
    if outcome.ended is not Ended.DONE:
        status = _UNFINISHED[outcome.ended]
        return MilpResult(status=status, bound=bound, seconds=outcome.seconds)
    status, x, last = outcome.result
    return MilpResult(
        status=_STATUS.get(status, SolveStatus.TIME_LIMIT),
        x=x,
        bound=None if last is None else last - CUTOFF_INCREMENT,
        seconds=outcome.seconds,
    )
