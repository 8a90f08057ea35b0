"""CBC in child processes: a crash, a hang or Ctrl-C there loses nothing here.

Each child uses one thread, so results do not depend on how many run side by side
(only a time limit can make them differ).
"""

from __future__ import annotations

import io
import json
import os
import queue
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import IO, TYPE_CHECKING, Any

import numpy as np

from moetuner.solver.base import SolveStatus

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from moetuner.solver.milp import MilpModel

# CBC looks at the clock between nodes; a child that is this late is stuck.
_GRACE = 5.0
_STATUS = {
    "OPTIMAL": SolveStatus.OPTIMAL,
    "FEASIBLE": SolveStatus.TIME_LIMIT,
    "NO_SOLUTION_FOUND": SolveStatus.TIME_LIMIT,
}


@dataclass(frozen=True, kw_only=True, slots=True)
class MilpResult:
    """What CBC found: ``x`` [n] or None, and a proven bound or None."""

    status: SolveStatus
    x: NDArray[np.float64] | None = None
    bound: float | None = None


UpdateCallback = Callable[[int, "float | None", "float | None"], None]


def solve_milps(
    models: Sequence[MilpModel],
    *,
    time_limit: float,
    gap_absolute: float = 0.0,
    threads: int = 0,
    seed: int = 0,
    on_update: UpdateCallback | None = None,
) -> list[MilpResult]:
    """Solve independent programs side by side within one time limit.

    Parameters
    ----------
    models
        The programs; the time that one leaves over goes to those after it.
    time_limit
        Seconds for all of them together.
    gap_absolute
        Stop a program when value - bound is below this.
    threads
        Children at a time; 0 means one per core.
    seed
        CBC's random seed.
    on_update
        Called with (index, incumbent, bound) when a program has news.

    Returns
    -------
    One result per program, in order. After Ctrl-C those that did not end have status
    `SolveStatus.INTERRUPTED`; the interrupt goes no further.
    """
    deadline = time.monotonic() + time_limit
    width = min(threads or os.cpu_count() or 1, len(models))
    results: list[MilpResult | None] = [None] * len(models)
    waiting = list(reversed(range(len(models))))
    children = [_Child() for _ in range(width)]
    busy: dict[_Child, tuple[int, float]] = {}
    try:
        while waiting or busy:
            for child in children:
                if child not in busy and waiting:
                    left = deadline - time.monotonic()
                    share = left * min(1.0, width / len(waiting))
                    index, limit = waiting.pop(), max(share, 0.1)
                    child.send(models[index], limit, gap_absolute, seed)
                    busy[child] = (index, time.monotonic() + limit + _GRACE)
            _collect(busy, results, on_update)
    except KeyboardInterrupt:
        pass
    finally:
        for child in children:
            child.close()
    lost = MilpResult(status=SolveStatus.INTERRUPTED)
    return [lost if result is None else result for result in results]


def _collect(
    busy: dict[_Child, tuple[int, float]],
    results: list[MilpResult | None],
    on_update: UpdateCallback | None,
) -> None:
    """Take what the busy children have to say; replace those that died or hang."""
    for child, (index, latest) in list(busy.items()):
        for answer in child.answers(wait=0.02):
            if "status" not in answer:
                if on_update:
                    on_update(index, answer["incumbent"], answer["bound"])
                continue
            results[index] = _result(answer)
            del busy[child]
        if child in busy and (child.dead or time.monotonic() > latest):
            results[index] = MilpResult(status=SolveStatus.TIME_LIMIT)
            del busy[child]
            child.restart()
        if child not in busy and on_update:
            result = results[index]
            on_update(index, None, result.bound if result else None)


def _result(answer: dict[str, Any]) -> MilpResult:
    x = answer["x"]
    return MilpResult(
        status=_STATUS.get(answer["status"], SolveStatus.TIME_LIMIT),
        x=None if x is None else np.array(x, np.float64),
        bound=answer["bound"],
    )


class _Child:
    """One worker process and the thread that reads its answers."""

    def __init__(self) -> None:
        self._start()

    @property
    def dead(self) -> bool:
        return self._process.poll() is not None and self._answers.empty()

    def send(
        self, model: MilpModel, time_limit: float, gap_absolute: float, seed: int
    ) -> None:
        archive = io.BytesIO()
        np.savez(archive, **asdict(model))
        frame = {
            "time_limit": time_limit,
            "gap_absolute": gap_absolute,
            "seed": seed,
            "size": archive.tell(),
        }
        try:
            self._stdin.write(json.dumps(frame).encode() + b"\n" + archive.getvalue())
            self._stdin.flush()
        except BrokenPipeError:
            pass  # it died; `dead` tells

    def answers(self, wait: float) -> list[dict[str, Any]]:
        """Every answer that is there; waits a little for the first."""
        found = []
        try:
            found.append(self._answers.get(timeout=wait))
            while True:
                found.append(self._answers.get_nowait())
        except queue.Empty:
            return found

    def restart(self) -> None:
        self.close()
        self._start()

    def close(self) -> None:
        self._process.kill()
        self._process.wait()
        self._stdin.close()
        self._reader.join()

    def _start(self) -> None:
        # Its own session: Ctrl-C in a terminal reaches us alone, and we decide.
        self._process = subprocess.Popen(
            [sys.executable, "-m", "moetuner.solver.cbc_worker"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            env=os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
            start_new_session=True,
        )
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._stdin = self._process.stdin
        self._answers: queue.SimpleQueue[dict[str, Any]] = queue.SimpleQueue()
        self._reader = threading.Thread(
            target=_read_answers,
            args=(self._process.stdout, self._answers),
            daemon=True,
        )
        self._reader.start()


def _read_answers(
    stream: IO[bytes], answers: queue.SimpleQueue[dict[str, Any]]
) -> None:
    with stream:
        for line in stream:
            answers.put(json.loads(line))
