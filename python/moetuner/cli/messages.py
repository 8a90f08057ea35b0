"""What the commands say on standard error."""

from __future__ import annotations

import os
import re
import sys
import textwrap
from typing import TYPE_CHECKING, NoReturn

if TYPE_CHECKING:
    from collections.abc import Iterable

_ABOUT_OPTIONS = re.compile(
    r"(?:[A-Z][a-z]+[A-Za-z]*|plan|split|evaluate|tally|import|certify|skew|sweep): "
)
"""How messages begin that are about an argument, not about a file."""
_NAMES = re.compile(r"(?<![-\w])([a-z]+(?:_[a-z]+)*)(=?)")
_ARGUMENT = re.compile(r"`([a-z]+(?:_[a-z]+)*)`")
"""An argument in a message of the library."""
_TYPED_AS = {
    "load": "--trace",
    "slot_experts": "--placement",
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

    ``PlanOptions: plan_fraction must be ...`` becomes ``--split must be ...``. What
    stands in backquotes is an argument wherever the message goes.
    """
    message = _ARGUMENT.sub(_typed, message)
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
    _say(f"error: {message}")
    sys.exit(code)


def note(message: str, quiet: bool) -> None:
    """Tell what was assumed, unless asked to be quiet."""
    if not quiet:
        _say(f"note: {message}")


def _typed(argument: re.Match[str]) -> str:
    name = argument[1]
    return _TYPED_AS.get(name, f"--{name.replace('_', '-')}")


def _say(text: str) -> None:
    """One line; on a terminal as many as it needs, broken between words."""
    text = _ARGUMENT.sub(_typed, text)
    if sys.stderr.isatty():
        text = "\n".join(
            textwrap.fill(
                line, _columns(), break_long_words=False, break_on_hyphens=False
            )
            for line in text.splitlines()
        )
    sys.stderr.write(f"{text}\n")  # as it is now: a progress bar may stand in


def _columns() -> int:
    """Of the terminal that standard error is."""
    try:
        told = os.environ.get("COLUMNS")
        return max(int(told or os.get_terminal_size(sys.stderr.fileno()).columns), 1)
    except (OSError, ValueError):
        return 80
