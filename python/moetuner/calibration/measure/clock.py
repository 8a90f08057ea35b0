"""Times of calls that all ranks make together: those of the slowest rank."""

from __future__ import annotations

import time
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from moetuner.calibration.samples import Timing

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from numpy.typing import NDArray

    from moetuner.calibration.measure.ranks import Ranks

    Floats = NDArray[np.float64]
    Step = Callable[[Any], Any]
    """Is given what the step before returned."""

MIN_REPEATS, MAX_REPEATS = 3, 31


class Clock:
    """Times steps by events on GPUs, by the processor's clock elsewhere.

    Before each repetition all ranks wait for each other. Whatever is decided by a time,
    is decided by the slowest rank's, so that all ranks decide alike.
    """

    def __init__(self, ranks: Ranks) -> None:
        self._ranks = ranks
        self._begin = time.monotonic()

    def elapsed(self) -> float:
        """Seconds since it was made, on the rank that sees the most."""
        return self._ranks.largest([time.monotonic() - self._begin])[0]

    def time(
        self, steps: Sequence[Step], seconds: float, rounds: int = 1
    ) -> tuple[Timing, ...]:
        """Times of each step, then of all together: medians of repetitions.

        Parameters
        ----------
        steps
            One after another is one call; the first is given None.
        seconds
            For the repetitions: as many as fit, `MIN_REPEATS` at least.
        rounds
            Calls of a repetition, one behind the other; its time is shared among them.
        """
        mine = self._repeat(steps, seconds, rounds)
        slowest = self._ranks.largest(mine.ravel().tolist())
        return _timings(np.array(slowest).reshape(mine.shape))

    def time_ranks(self, step: Step, seconds: float, rounds: int = 1) -> list[Timing]:
        """Times of one step: of the slowest rank, then of each rank by itself."""
        mine = self._repeat([step], seconds, rounds)[:, 0]
        each = np.array(self._ranks.every(mine.tolist()))  # [G, repetitions]
        return list(_timings(np.vstack([each.max(axis=0), each]).T))

    def _repeat(self, steps: Sequence[Step], seconds: float, rounds: int) -> Floats:
        """Seconds of this rank: [repetitions, steps and their sum]."""
        self._once(steps, rounds)  # warms up
        first = sum(self._ranks.largest(self._once(steps, rounds)))
        wanted = int(seconds / max(first, 1e-9))
        repeats = min(max(wanted, MIN_REPEATS), MAX_REPEATS)
        mine = np.array([self._once(steps, rounds) for _ in range(repeats)])
        return np.column_stack([mine, mine.sum(axis=1)]) / rounds

    def _once(self, steps: Sequence[Step], rounds: int) -> list[float]:
        """Seconds of each step on this rank, all rounds together."""
        self._ranks.wait()
        marks = [self._mark()]
        spent = np.zeros(len(steps))
        for _ in range(rounds if len(steps) > 1 else 1):
            value: Any = None
            for step in steps:
                value = step(value)
                for _ in range(rounds - 1 if len(steps) == 1 else 0):
                    step(None)
                marks.append(self._mark())
        if self._ranks.on_cuda:
            torch.cuda.synchronize()
        for number, (start, end) in enumerate(pairwise(marks)):
            spent[number % len(steps)] += self._between(start, end)
        seconds: list[float] = spent.tolist()
        return seconds

    def _mark(self) -> Any:
        if not self._ranks.on_cuda:
            return time.perf_counter()
        event: Any = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call,unused-ignore]
        event.record()
        return event

    def _between(self, start: Any, end: Any) -> float:
        if self._ranks.on_cuda:
            return float(start.elapsed_time(end)) * 1e-3
        return float(end - start)


def _timings(seconds: Floats) -> tuple[Timing, ...]:
    """Median and spread of each column."""
    low, middle, high = np.percentile(seconds, (25, 50, 75), axis=0)
    return tuple(
        Timing(seconds=float(median), spread=float(to - start), repeats=len(seconds))
        for start, median, to in zip(low, middle, high, strict=True)
    )
