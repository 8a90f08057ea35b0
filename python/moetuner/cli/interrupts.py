"""Ctrl-C, and SIGTERM: acknowledged at once, obeyed within `OBEY_SECONDS`.

The signal raises KeyboardInterrupt as soon as Python runs again, and a command ends as
it always does, with the best that it has. A thread sees to the rest. It says at once
that the signal was heard. Where what is left takes too long (the scores of a large
placement, say) it ends the program, and says what was kept.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING, Any, NoReturn

from moetuner._files import remove_unfinished

if TYPE_CHECKING:
    from collections.abc import Iterator

SIGNALS = (signal.SIGINT, signal.SIGTERM)
OBEY_SECONDS = 2.0
"""From the first signal to the end of the program, at most."""
INTERRUPTED = 130
"""Exit code."""
NOTHING = "interrupted, nothing was written"
_MARGIN = 0.2
"""Of `OBEY_SECONDS`, for ending."""
_HEARD = "\ninterrupted: stopping\n"
_STDERR = 2

_last_words = NOTHING
"""Of this process, as signals are: what is said if it has to be ended."""


def keep_in_mind(words: str) -> None:
    """What to say from now on if the program has to be ended by `obeyed`."""
    global _last_words
    _last_words = words


def last_words() -> str:
    """What was kept, for whoever ends the program in time."""
    return _last_words


@contextmanager
def obeyed() -> Iterator[None]:
    """Signals in this block are acknowledged at once, and end the program in time."""
    acknowledgement = _Acknowledgement()

    def hear(*_: Any) -> NoReturn:
        acknowledgement.give()  # in front of all that the command says then
        raise KeyboardInterrupt

    handlers = {number: signal.signal(number, hear) for number in SIGNALS}
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    before = signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
    watch = threading.Thread(target=_watch, args=(reader, acknowledgement), daemon=True)
    watch.start()
    try:
        yield
    except SystemExit as ended:
        if acknowledgement.was_given:
            _end_beside_calls(ended.code)
        raise
    finally:
        signal.set_wakeup_fd(before)
        os.close(writer)  # ends the thread, unless it heard a signal
        for number, handler in handlers.items():
            signal.signal(number, handler)


class _Acknowledgement:
    """Given once, by whoever hears a signal first."""

    def __init__(self) -> None:
        self._begun, self._given = threading.Lock(), threading.Event()

    @property
    def was_given(self) -> bool:
        return self._given.is_set()

    def give(self) -> None:
        """Say it, or wait until it was said."""
        if self._begun.acquire(blocking=False):
            _say(_HEARD)
            self._given.set()
        self._given.wait(OBEY_SECONDS)


def _end_beside_calls(code: Any) -> None:
    """End the program here where a call that was given up still runs in the core.

    Python's own end stops threads as they come back to it, which aborts the program.
    """
    from moetuner.solver.joint.interruptible import calls_left

    if calls_left():
        remove_unfinished()
        for stream in (sys.stdout, sys.stderr):
            stream.flush()
        os._exit(code if isinstance(code, int) else 1)


def _watch(reader: int, acknowledgement: _Acknowledgement) -> None:
    """Wait for a signal, or for the end; Python writes the number of each signal."""
    with os.fdopen(reader, "rb", buffering=0) as pipe:
        heard = pipe.read(1)
        while heard and heard[0] not in SIGNALS:
            heard = pipe.read(1)
        if not heard:
            return
        acknowledgement.give()
        time.sleep(OBEY_SECONDS - _MARGIN)
        remove_unfinished()
        _say(f"error: {_last_words}\n")
        os._exit(INTERRUPTED)


def _say(text: str) -> None:
    with suppress(OSError):  # not sys.stderr, which may be in the middle of a line
        os.write(_STDERR, text.encode())
