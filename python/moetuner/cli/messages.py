"""What the commands say on standard error."""

from __future__ import annotations

import sys
from typing import NoReturn

import typer


def fail(message: str, code: int) -> NoReturn:
    """End the program with one line that says why."""
    typer.echo(f"error: {message}", err=True)
    sys.exit(code)


def note(message: str, quiet: bool) -> None:
    """Tell what was assumed, unless asked to be quiet."""
    if not quiet:
        typer.echo(f"note: {message}", err=True)
