"""The one pool of child processes: a crash, a hang or Ctrl-C there loses nothing here.

A child makes one handler, ``module:Class``, and calls it with one task after the other:
``handler(task, until, tell)`` returns the result, and may ``tell`` news on its way.
Tasks, news and results are pickled. What a child prints goes to its standard error, the
last line of which is kept for an error message.

Threads would not do: CBC and SciPy hold the interpreter while they work, and BLAS with
several threads is slower than with one on small matrices. So each child has one thread,
and what it finds does not depend on how many run side by side, but for the clock.
"""

from __future__ import annotations

import contextlib
import enum
import importlib
import os
import pickle
import queue
import signal
import subprocess
import sys
import tempfile
import threading
import time
import traceback
from collections import deque
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

# A child imports from where we do: `-m` would look in the working directory first.
_CHILD = (
    "import sys; handler = sys.argv[1]; sys.path[:] = sys.argv[2:]; "
    "from moetuner._workers import serve; serve(handler)"
)
_ONE_THREAD = dict.fromkeys(
    ("OPENBLAS_NUM_THREADS", "OMP_NUM_THREADS", "MKL_NUM_THREADS"), "1"
)
_POLL = 1.0  # seconds at most between two looks at the clock


class Ended(enum.Enum):
    """How a task ended."""

    DONE = "done"
    """There is a result."""
    LATE = "late"
    """The time was up before there was one, or before the task began."""
    DIED = "died"
    """Its child died."""
    NOT_STARTED = "not started"
    """No child could be started: its imports failed."""
    INTERRUPTED = "interrupted"
    """Ctrl-C came first."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Outcome:
    """What became of a task: the handler's result, and the seconds that it had.

    ``last_words`` is what a child said last that died or could not start.
    """

    ended: Ended
    result: Any = None
    seconds: float = 0.0
    last_words: str = ""


def run_tasks(
    handler: str,
    tasks: Sequence[Any],
    *,
    deadline: float,
    threads: int = 0,
    patience: float = float("inf"),
    grace: float = 1.0,
    on_news: Callable[[int, Any], None] | None = None,
    on_end: Callable[[int, Outcome], None] | None = None,
) -> list[Outcome]:
    """Do all tasks side by side, each in its share of the time.

    Parameters
    ----------
    handler
        ``module:Class`` of what does a task in a child.
    tasks
        Anything that pickles. The time that one leaves over goes to those after it.
    deadline
        `time.monotonic` when all shall have ended; what did not begin by then is late.
    threads
        Children at a time; 0 means one per core.
    patience, grace
        A child is ended when its task is so many seconds beyond its share, or beyond
        the deadline.
    on_news
        Called with (index, news) when a handler tells some.
    on_end
        Called with (index, outcome) when a task ends that had begun.

    Returns
    -------
    One outcome per task, in order. Ctrl-C ends all tasks, and goes no further.
    """
    pool = _Pool(
        handler=handler,
        tasks=tasks,
        deadline=deadline,
        patience=patience,
        grace=grace,
        on_news=on_news,
        on_end=on_end,
    )
    with contextlib.suppress(KeyboardInterrupt):
        try:
            pool.run(min(threads or os.cpu_count() or 1, len(tasks)))
        finally:
            pool.close()
    return pool.outcomes


@dataclass(frozen=True, kw_only=True, slots=True)
class _Work:
    """A task that a child has; times of `time.monotonic`."""

    index: int
    began: float
    latest: float


@dataclass(kw_only=True)
class _Pool:
    handler: str
    tasks: Sequence[Any]
    deadline: float
    patience: float
    grace: float
    on_news: Callable[[int, Any], None] | None
    on_end: Callable[[int, Outcome], None] | None
    outcomes: list[Outcome] = field(init=False)
    """What holds of each task until it ends."""
    _waiting: deque[int] = field(init=False)
    _crew: list[_Child] = field(default_factory=list)
    _busy: dict[_Child, _Work] = field(default_factory=dict)
    _inbox: queue.SimpleQueue[_Message] = field(default_factory=queue.SimpleQueue)

    def __post_init__(self) -> None:
        self.outcomes = [Outcome(ended=Ended.INTERRUPTED) for _ in self.tasks]
        self._waiting = deque(range(len(self.tasks)))

    def run(self, width: int) -> None:
        """Until every task has ended, or the time is up."""
        while len(self._crew) < width:
            self._crew.append(_Child(self.handler, self._inbox))
        while self._waiting or self._busy:
            self._hand_out(width)
            if not self._busy:
                break
            self._hear()
            now = time.monotonic()
            for child, work in list(self._busy.items()):
                if now > work.latest:
                    self._end(
                        child, Outcome(ended=Ended.LATE, seconds=now - work.began)
                    )
                    self._dismiss(child)
        while self._waiting:
            self.outcomes[self._waiting.popleft()] = Outcome(ended=Ended.LATE)

    def close(self) -> None:
        """End all children."""
        while self._crew:
            self._crew.pop().close()

    def _hand_out(self, width: int) -> None:
        """Give every idle child a task, while there is time for one."""
        while len(self._busy) < width and self._waiting:
            now = time.monotonic()
            left = self.deadline - now
            if left <= 0:
                return
            share = left * min(1.0, width / len(self._waiting))
            child = next((c for c in self._crew if c not in self._busy), None)
            if child is None:  # one died, or was too late
                child = _Child(self.handler, self._inbox)
                self._crew.append(child)
            index = self._waiting.popleft()
            latest = min(now + share + self.patience, self.deadline + self.grace)
            self._busy[child] = _Work(index=index, began=now, latest=latest)
            child.send(self.tasks[index], time.time() + share)

    def _hear(self) -> None:
        """Wait for the next message, until somebody is late."""
        until = min(work.latest for work in self._busy.values())
        wait = min(max(until - time.monotonic(), 0.0), _POLL)
        try:
            message = self._inbox.get(timeout=wait)
        except queue.Empty:
            return
        child = message.child
        if child not in self._crew:
            return  # of one that was dismissed
        if message.kind is _Kind.READY:
            child.ready = True
        elif message.kind is _Kind.GONE:
            self._bury(child)
        elif message.kind is _Kind.RESULT:
            seconds = time.monotonic() - self._busy[child].began
            done = Outcome(ended=Ended.DONE, result=message.content, seconds=seconds)
            self._end(child, done)
        elif self.on_news and child in self._busy:
            self.on_news(self._busy[child].index, message.content)

    def _bury(self, child: _Child) -> None:
        """What a child leaves that died."""
        words, ended = child.last_words(), Ended.DIED
        if not child.ready:
            ended = Ended.NOT_STARTED
            while self._waiting:  # no other would do better
                self.outcomes[self._waiting.popleft()] = Outcome(
                    ended=ended, last_words=words
                )
        if child in self._busy:
            seconds = time.monotonic() - self._busy[child].began
            self._end(child, Outcome(ended=ended, seconds=seconds, last_words=words))
        self._dismiss(child)

    def _end(self, child: _Child, outcome: Outcome) -> None:
        index = self._busy.pop(child).index
        self.outcomes[index] = outcome
        if self.on_end:
            self.on_end(index, outcome)

    def _dismiss(self, child: _Child) -> None:
        self._crew.remove(child)
        child.close()


class _Kind(enum.Enum):
    READY = "ready"
    NEWS = "news"
    RESULT = "result"
    GONE = "gone"


@dataclass(frozen=True, kw_only=True, slots=True)
class _Message:
    child: _Child
    kind: _Kind
    content: Any = None


class _Child:
    """One process, and the thread that reads what it says."""

    def __init__(self, handler: str, inbox: queue.SimpleQueue[_Message]) -> None:
        self.ready = False
        """Whether its handler was made."""
        self._errors = tempfile.TemporaryFile()  # noqa: SIM115, closed by `close`
        # Its own session: Ctrl-C in a terminal reaches us alone, and we decide.
        self._process = subprocess.Popen(
            [
                *(sys.executable, "-c", _CHILD, handler),
                *(path or str(Path.cwd()) for path in sys.path),
            ],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors,
            env={**os.environ, **_ONE_THREAD},
            start_new_session=True,
        )
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._stdin = self._process.stdin
        self._reader = threading.Thread(
            target=self._read, args=(self._process.stdout, inbox), daemon=True
        )
        self._reader.start()

    def send(self, task: Any, until: float) -> None:
        """A task, and the `time.time` until which it may take."""
        # A pipe breaks when the child died; its reader tells.
        with contextlib.suppress(BrokenPipeError):
            pickle.dump((task, until), self._stdin)
            self._stdin.flush()

    def last_words(self) -> str:
        """The last line of its standard error, or else its exit code."""
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(timeout=_POLL)
        self._errors.seek(0)
        lines = self._errors.read().decode(errors="replace").split("\n")
        said = [line.strip() for line in lines if line.strip()]
        return said[-1] if said else f"exit code {self._process.poll()}"

    def close(self) -> None:
        """End the process, whatever it does."""
        self._process.kill()
        self._process.wait()
        with contextlib.suppress(BrokenPipeError):
            self._stdin.close()
        self._reader.join()
        self._errors.close()

    def _read(self, stream: IO[bytes], inbox: queue.SimpleQueue[_Message]) -> None:
        # Cut off, or not ours: either way nothing more will come.
        cut_off = contextlib.suppress(EOFError, OSError, pickle.UnpicklingError)
        with stream, cut_off:
            while True:
                kind, content = pickle.load(stream)
                inbox.put(_Message(child=self, kind=kind, content=content))
        inbox.put(_Message(child=self, kind=_Kind.GONE))


def serve(handler: str) -> None:
    """In a child: do tasks until standard input ends, even in the middle of one."""
    try:
        _serve(handler)
    except BaseException:
        # Not by the interpreter's own end: it would have to stop the thread that reads
        # standard input, fails at it now and then, and then speaks of nothing else.
        traceback.print_exc()
        sys.stderr.flush()
        os._exit(1)


def _serve(handler: str) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent decides
    stream = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # what is printed is no message
    lock = threading.Lock()

    def say(kind: _Kind, content: Any = None) -> None:
        with lock:
            pickle.dump((kind, content), stream)
            stream.flush()

    tasks: queue.SimpleQueue[tuple[Any, float]] = queue.SimpleQueue()
    threading.Thread(target=_receive, args=(tasks,), daemon=True).start()
    module, _, name = handler.partition(":")
    work = getattr(importlib.import_module(module), name)()
    say(_Kind.READY)
    while True:
        task, until = tasks.get()
        say(_Kind.RESULT, work(task, until, lambda news: say(_Kind.NEWS, news)))


def _receive(tasks: queue.SimpleQueue[tuple[Any, float]]) -> None:
    try:
        while True:
            tasks.put(pickle.load(sys.stdin.buffer))
    except EOFError:
        os._exit(0)  # whoever asked is gone, perhaps killed: nobody wants an answer
    except BaseException:
        traceback.print_exc()
        os._exit(1)
