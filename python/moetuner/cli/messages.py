"""What the commands say on standard error."""

from __future__ import annotations

import re
import sys
from typing import TYPE_CHECKING, NoReturn

import typer

if TYPE_CHECKING:
    from collections.abc import Iterable

_ABOUT_OPTIONS = re.compile(
    r"(?:[A-Z][a-z]+[A-Za-z]*|plan|split|evaluate|tally|skew|sweep): "
)
"""How messages begin that are about an argument, not about a file."""
_NAMES = re.compile(r"(?<![-\w])([a-z]+(?:_[a-z]+)*)(=?)")
_TYPED_AS = {
    "plan_fraction": "--split",
    "fraction": "--split",
    "prove_seconds": "--prove",
    "move_seconds": "--move-cost",
    "num_ranks": "--ranks",
    "stay": "--from",
}
"""Arguments of the library that have another name on the command line."""


def as_typed(message: str, options: Iterable[str]) -> str:
    """`message` with the library's arguments as the `options` that the user typed.

    ``PlanOptions: plan_fraction must be ...`` becomes ``--split must be ...``.
    """
    begins = _ABOUT_OPTIONS.match(message)
    if begins is None:
        return message
    known = set(options)
    own = {each[2:].replace("-", "_"): each for each in known if each[:2] == "--"}
    own |= {name: each for name, each in _TYPED_AS.items() if each in known}

    def typed(found: re.Match[str]) -> str:
        name, equals = found.groups()
        first = found.start() == begins.end()
        if name in own and (first or equals or "_" in name):  # else plain English
            return own[name] + (" " if equals else "")
        return found[0]

    said = _NAMES.sub(typed, message)
    about = said[begins.end() :]
    return about if about.startswith("--") else said


def fail(message: str, code: int) -> NoReturn:
    """End the program with one line that says why."""
    typer.echo(f"error: {message}", err=True)
    sys.exit(code)


def note(message: str, quiet: bool) -> None:
    """Tell what was assumed, unless asked to be quiet."""
    if not quiet:
        typer.echo(f"note: {message}", err=True)
