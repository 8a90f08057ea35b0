"""A bar on standard error that follows an import."""

from __future__ import annotations

import time
from typing import Any

from rich.console import Console
from rich.progress import (
    BarColumn,
    Progress,
    TaskProgressColumn,
    TextColumn,
    TimeRemainingColumn,
)

_PLAIN_EVERY = 5.0  # seconds between lines when nobody watches a terminal


class ByteProgress:
    """A bar on a terminal, a plain line every few seconds elsewhere."""

    def __init__(self, quiet: bool = False) -> None:
        console = Console(stderr=True, highlight=False, markup=False)
        self._console = console
        self._bar = Progress(
            TextColumn("importing"),
            BarColumn(),
            TaskProgressColumn(),
            TimeRemainingColumn(),
            console=console,
            transient=True,
            disable=quiet or not console.is_terminal or console.is_dumb_terminal,
        )
        self._plain = not quiet and self._bar.disable
        self._task = self._bar.add_task("importing", total=None)
        self._last = time.monotonic()

    def __enter__(self) -> ByteProgress:
        self._bar.start()
        return self

    def __exit__(self, *error: Any) -> None:
        self._bar.stop()

    def update(self, done: int, total: int) -> None:
        """Show how far it is."""
        self._bar.update(self._task, completed=done, total=total)
        if self._plain and time.monotonic() - self._last >= _PLAIN_EVERY:
            self._last = time.monotonic()
            self._console.print(f"importing {done / max(total, 1):.0%}")
