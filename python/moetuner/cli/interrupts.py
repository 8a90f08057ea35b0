"""Ctrl-C in the middle of long work."""

from __future__ import annotations

import os
import signal
import threading
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING, Any, NoReturn

if TYPE_CHECKING:
    from collections.abc import Iterator

SIGNALS = (signal.SIGINT, signal.SIGTERM)
_HEARD = b"\ninterrupted: stopping\n"
_STDERR = 2


@contextmanager
def acknowledged(quiet: bool) -> Iterator[None]:
    """Say at once that a signal was heard, before the work comes to its end.

    What it led to is said then: whether there is a result, and where.
    """
    if quiet or threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.signal(number, _heard) for number in SIGNALS}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _heard(*_: Any) -> NoReturn:
    with suppress(OSError):  # not sys.stderr, which may be in the middle of a line
        os.write(_STDERR, _HEARD)
    raise KeyboardInterrupt
