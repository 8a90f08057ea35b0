"""A line on standard error that follows a solver: incumbent, bound, gap."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any

from rich.console import Console

from moetuner.report.words import gap, solved

if TYPE_CHECKING:
    from rich.status import Status

    from moetuner.solver.base import ProgressEvent

_PLAIN_EVERY = 5.0  # seconds between lines when nobody watches a terminal


class ProgressLine:
    """A live line on a terminal, elsewhere a plain one a stage or every few seconds."""

    def __init__(self) -> None:
        self._console = Console(stderr=True, highlight=False, markup=False)
        self._status: Status | None = None
        self._stage, self._last = "", -_PLAIN_EVERY

    def __enter__(self) -> ProgressLine:
        return self

    def __exit__(self, *error: Any) -> None:
        if self._status is not None:
            self._status.stop()

    def update(self, event: ProgressEvent) -> None:
        """Show the news."""
        text = format_event(event)
        if self._console.is_terminal and not self._console.is_dumb_terminal:
            if self._status is None:
                self._status = self._console.status(text)
                self._status.start()
            self._status.update(text)
        elif (
            event.stage != self._stage or time.monotonic() - self._last >= _PLAIN_EVERY
        ):
            self._stage, self._last = event.stage, time.monotonic()
            self._console.print(text, soft_wrap=True)


def format_event(event: ProgressEvent) -> str:
    """The event as one line."""
    parts = [f"{event.stage} {event.done}/{event.total}"]
    if event.incumbent is not None:
        parts.append(f"incumbent {solved(event.incumbent)}")
        if event.bound is not None:
            far = gap(event.incumbent, event.bound)
            parts.append(f"bound {solved(event.bound)} gap {far}")
    return "  ".join([*parts, f"{event.seconds:.0f} s"])
