"""Calls into the C++ core that Ctrl-C can end early."""

from __future__ import annotations

import math
import threading
import time
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Callable

    from numpy.typing import NDArray

    Result = TypeVar("Result")

LAST_SECONDS = 0.8
"""What a valuation may take after a Ctrl-C; a program is to end within two seconds."""
_POLL = 0.1  # seconds between looks for a signal


_begun: list[_Work] = []
"""Calls, but for those that were done when the next one began."""


def calls_left() -> bool:
    """Whether a call still runs: after a Ctrl-C nobody may wait for it."""
    return any(not work.done.is_set() for work in _begun)


class Interruptible:
    """Runs calls in a thread of their own, so that signals reach this one at once.

    After a first Ctrl-C ``interrupted`` is set, the call that ran returns what it has,
    and later calls come back at once.
    """

    def __init__(self) -> None:
        self.stop = np.zeros(1, np.int32)

    @property
    def interrupted(self) -> bool:
        """Whether the user stopped a call."""
        return bool(self.stop[0])

    def run(self, call: Callable[[NDArray[np.int32]], Result]) -> Result:
        """What ``call(stop)`` returns; it must end soon once stop[0] is not zero."""
        work = _Work(lambda: call(self.stop))
        while True:
            try:
                while not work.done.wait(_POLL):
                    pass
                break
            except KeyboardInterrupt:
                self.stop[0] = 1
        return work.result()  # type: ignore[no-any-return]

    def in_time(self, call: Callable[[], Result]) -> Result | None:
        """What ``call()`` returns, which nothing can stop.

        After a Ctrl-C None, where it takes longer than `LAST_SECONDS`: then it ends by
        itself, and may change nothing that others read.
        """
        work, latest = _Work(call), math.inf
        while True:
            try:
                if self.interrupted:
                    latest = min(latest, time.monotonic() + LAST_SECONDS)
                while not work.done.wait(_POLL):
                    if time.monotonic() > latest:
                        return None
                return work.result()  # type: ignore[no-any-return]
            except KeyboardInterrupt:
                self.stop[0] = 1


class _Work:
    """A call in a thread of its own."""

    def __init__(self, call: Callable[[], Any]) -> None:
        self.done = threading.Event()
        self._outcome: list[Any] = []
        self._call = call
        _begun[:] = [work for work in _begun if not work.done.is_set()] + [self]
        # Never joined: interrupted, join takes it for ended (Python < 3.13).
        threading.Thread(target=self._run, daemon=True).start()

    def _run(self) -> None:
        try:
            self._outcome.append((self._call(), None))
        except BaseException as error:
            self._outcome.append((None, error))
        finally:
            self.done.set()

    def result(self) -> Any:
        """What the call returned or raised; once it is done."""
        result, error = self._outcome[0]
        if error is not None:
            raise error
        return result
