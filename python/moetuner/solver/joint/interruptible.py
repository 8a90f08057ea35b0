"""Calls into the C++ core that Ctrl-C can end early."""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Callable

    from numpy.typing import NDArray

    Result = TypeVar("Result")

_POLL = 0.1  # seconds between looks for a signal


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
        outcome: list[Any] = []
        done = threading.Event()

        def work() -> None:
            try:
                outcome.append((call(self.stop), None))
            except BaseException as error:
                outcome.append((None, error))
            finally:
                done.set()

        threading.Thread(target=work, daemon=True).start()
        # Not Thread.join: interrupted, it takes the thread for ended (Python < 3.13).
        while True:
            try:
                while not done.wait(_POLL):
                    pass
                break
            except KeyboardInterrupt:
                self.stop[0] = 1
        result, error = outcome[0]
        if error is not None:
            raise error
        return result  # type: ignore[no-any-return]
