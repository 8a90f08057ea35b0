"""CBC in child processes: a crash, a hang or Ctrl-C there loses nothing here.

Each child uses one thread, so results do not depend on how many run side by side
(only a time limit can make them differ).
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import queue
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

import numpy as np

from moetuner.errors import MissingDependencyError
from moetuner.solver.base import SolveStatus

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from moetuner.solver.programs.model import MilpModel

CUTOFF_INCREMENT = 1e-5
"""CBC passes over what improves its incumbent by less: bounds are lowered by this."""
# CBC looks at the clock between nodes; a child that is this late is not waited for.
_GRACE = 1.0
# The worker imports from where we do: `-m` would look in the working directory first.
_WORKER = (
    "import sys; sys.path[:] = sys.argv[1:]; "
    "from moetuner.solver.programs.cbc_worker import main; main()"
)
_STATUS = {
    "OPTIMAL": SolveStatus.OPTIMAL,
    "FEASIBLE": SolveStatus.TIME_LIMIT,
    "NO_SOLUTION_FOUND": SolveStatus.TIME_LIMIT,
}


@dataclass(frozen=True, kw_only=True, slots=True)
class MilpResult:
    """What CBC found: ``x`` [n] or None, a proven bound or None, and in how long."""

    status: SolveStatus
    x: NDArray[np.float64] | None = None
    bound: float | None = None
    seconds: float = 0.0


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
        Stop a program when value - bound is below this, or `CUTOFF_INCREMENT`.
    threads
        Children at a time; 0 means one per core.
    seed
        CBC's random seed.
    on_update
        Called with (index, incumbent, bound) when a program has news.

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
    deadline = time.time() + time_limit
    width = min(threads or os.cpu_count() or 1, len(models))
    # What holds of a program until it ends.
    results = [MilpResult(status=SolveStatus.INTERRUPTED) for _ in models]
    waiting = list(reversed(range(len(models))))
    children: list[_Child] = []
    busy: dict[_Child, _Task] = {}
    try:
        for _ in range(width):
            children.append(_Child())
        while waiting or busy:
            for child in children:
                left = deadline - time.time()
                if child not in busy and waiting and left > 0:
                    share = left * min(1.0, width / len(waiting))
                    index, latest = waiting.pop(), time.time() + share
                    if not child.running:
                        child.restart()
                    child.send(models[index], latest, gap_absolute, seed)
                    busy[child] = _Task(index=index, latest=latest + _GRACE)
            _collect(busy, results, on_update)
            if not busy and time.time() >= deadline:
                break
        for index in waiting:
            results[index] = MilpResult(status=SolveStatus.TIME_LIMIT)
    except KeyboardInterrupt:
        pass
    finally:
        for child in children:
            child.close()
    return results


@dataclass(frozen=True, kw_only=True, slots=True)
class _Task:
    """A program that a child has, and when it is late."""

    index: int
    latest: float
    began: float = field(default_factory=time.monotonic)

    @property
    def seconds(self) -> float:
        return time.monotonic() - self.began


def _collect(
    busy: dict[_Child, _Task],
    results: list[MilpResult],
    on_update: UpdateCallback | None,
) -> None:
    """Take what the busy children have to say; stop those that died or are late."""
    for child, task in list(busy.items()):
        index = task.index
        for answer in child.answers(wait=0.02):
            if "status" in answer:
                results[index] = _result(answer, task.seconds)
                del busy[child]
                continue
            bound = _proven(answer["bound"])
            if bound is not None:
                results[index] = replace(results[index], bound=bound)
            if on_update:
                on_update(index, answer["incumbent"], bound)
        if child in busy and child.dead and not child.ready:
            why = child.last_words()
            if "No module named 'mip'" in why:
                why += "; pip install 'moetuner[cbc]'"
            raise MissingDependencyError(f"solver: CBC does not start here: {why}")
        if child in busy and (child.dead or time.time() > task.latest):
            status = SolveStatus.FAILED if child.dead else SolveStatus.TIME_LIMIT
            results[index] = replace(
                results[index], status=status, seconds=task.seconds
            )
            del busy[child]
            child.close()
        if child not in busy and on_update:
            on_update(index, None, results[index].bound)


def _result(answer: dict[str, Any], seconds: float) -> MilpResult:
    x = answer["x"]
    return MilpResult(
        status=_STATUS.get(answer["status"], SolveStatus.TIME_LIMIT),
        x=None if x is None else np.array(x, np.float64),
        bound=_proven(answer["bound"]),
        seconds=seconds,
    )


def _proven(bound: float | None) -> float | None:
    """What CBC's bound proves, given what it passes over."""
    return None if bound is None else bound - CUTOFF_INCREMENT


class _Child:
    """One worker process and the thread that reads its answers."""

    def __init__(self) -> None:
        self._start()
        self.ready = False
        """Whether CBC was loaded."""

    @property
    def running(self) -> bool:
        return self._process.poll() is None

    @property
    def dead(self) -> bool:
        """It ended, and all that it said has been heard."""
        return not self.running and self._answers.empty()

    def send(
        self, model: MilpModel, deadline: float, gap_absolute: float, seed: int
    ) -> None:
        archive = io.BytesIO()
        np.savez(archive, **asdict(model))
        frame = {
            "deadline": deadline,
            "gap_absolute": gap_absolute,
            "seed": seed,
            "size": archive.tell(),
        }
        # A pipe breaks when the child died; `dead` tells.
        with contextlib.suppress(BrokenPipeError):
            self._stdin.write(json.dumps(frame).encode() + b"\n" + archive.getvalue())
            self._stdin.flush()

    def answers(self, wait: float) -> list[dict[str, Any]]:
        """Every answer that is there; waits a little for the first."""
        found = []
        try:
            found.append(self._answers.get(timeout=wait))
            while True:
                found.append(self._answers.get_nowait())
        except queue.Empty:
            self.ready = self.ready or bool(found)
            return [answer for answer in found if "ready" not in answer]

    def last_words(self) -> str:
        """The last line of its standard error, or else its exit code."""
        self._errors.seek(0)
        lines = self._errors.read().decode(errors="replace").split("\n")
        said = [line.strip() for line in lines if line.strip()]
        return said[-1] if said else f"exit code {self._process.poll()}"

    def restart(self) -> None:
        self.close()
        self._start()

    def close(self) -> None:
        """End the process, whatever it does; does nothing the second time."""
        self._process.kill()
        self._process.wait()
        with contextlib.suppress(BrokenPipeError):
            self._stdin.close()
        self._reader.join()
        self._errors.close()

    def _start(self) -> None:
        # Its own session: Ctrl-C in a terminal reaches us alone, and we decide.
        self._errors = tempfile.TemporaryFile()  # noqa: SIM115, closed by `close`
        self._process = subprocess.Popen(
            [
                sys.executable,
                "-c",
                _WORKER,
                *(path or str(Path.cwd()) for path in sys.path),
            ],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors,
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
