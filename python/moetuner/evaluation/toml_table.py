"""Tables of a TOML file: every key is known, and errors name file and key."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any, NoReturn, TypeVar

from moetuner.errors import InvalidProblemError
from moetuner.evaluation.units import Unit, quantity, wanted

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

Made = TypeVar("Made")


def read_toml(path: Path) -> dict[str, Any]:
    """The contents of `path`; refuses what is no TOML."""
    try:
        values: dict[str, Any] = tomllib.loads(path.read_bytes().decode())
    except (UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise InvalidProblemError(f"{path}: not a TOML file: {error}") from error
    return values


class Table:
    """Values by key; each is taken once, and what is left is refused.

    Parameters
    ----------
    file
        For errors.
    place
        Keys that lead here, "inside." say.
    values
        What the file has.
    """

    def __init__(self, file: str, place: str, values: dict[str, Any]) -> None:
        self.file, self.place = file, place
        self._left = dict(values)
        self._known: set[str] = set()

    def fail(self, key: str, problem: str) -> NoReturn:
        """Raise an error about `key`."""
        raise InvalidProblemError(f"{self.file}: {self.place}{key}: {problem}")

    def has(self, key: str) -> bool:
        """Whether the file has `key`, which is a known one."""
        self._known.add(key)
        return key in self._left

    def take(self, key: str, what: str, default: Any = None) -> Any:
        """The value of `key`; refused when it is missing and there is no default."""
        self._known.add(key)
        if key in self._left:
            return self._left.pop(key)
        if default is None:
            self.fail(key, f"is missing, wanted {what}")
        return default

    def text(self, key: str, default: str | None = None) -> str:
        """Printable text on one line."""
        value = self.take(key, "text", default)
        if not isinstance(value, str) or not value.isprintable():
            self.fail(key, f"wanted text on one line, got {value!r:.60}")
        return value

    def texts(self, key: str) -> tuple[str, ...]:
        """A list of texts; nothing where there is none."""
        values = self.take(key, "a list of texts", [])
        if not isinstance(values, list) or not all(
            isinstance(value, str) and value.isprintable() for value in values
        ):
            self.fail(key, f"wanted a list of texts on one line, got {values!r:.60}")
        return tuple(values)

    def whole(self, key: str, default: int | None = None) -> int:
        """A whole number >= 1."""
        value = self.take(key, "a whole number >= 1", default)
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            self.fail(key, f"wanted a whole number >= 1, got {value!r:.60}")
        return value

    def number(self, key: str, unit: Unit, default: float | None = None) -> float:
        """A quantity: a bandwidth or a rate is positive, a time not negative."""
        return self.as_number(key, self.take(key, wanted(unit), default), unit)

    def numbers(self, key: str, unit: Unit) -> tuple[float, ...]:
        """One quantity, or a list of them."""
        value = self.take(key, f"{wanted(unit)}, or a list of such")
        values = value if isinstance(value, list) else [value]
        if not values:
            self.fail(key, f"wanted {wanted(unit)}, got an empty list")
        return tuple(self.as_number(key, each, unit) for each in values)

    def as_number(
        self, key: str, value: Any, unit: Unit, what: str | None = None
    ) -> float:
        """`value` as a quantity; `key`, and what else would do, are for errors."""
        number = quantity(value, unit)
        if number is None:
            self.fail(key, f"wanted {what or wanted(unit)}, got {value!r:.60}")
        lowest = _SMALLEST.get(unit, 0.0)
        if not lowest <= number < float("inf"):
            self.fail(
                key,
                f"wanted {wanted(unit)}, {_range(unit)}, got {value!r:.60}",
            )
        return number

    def table(self, key: str) -> Table:
        """A table inside this one."""
        value = self.take(key, "a table")
        if not isinstance(value, dict):
            self.fail(key, f"wanted a table, got {value!r:.60}")
        return Table(self.file, f"{self.place}{key}.", value)

    def tables(self, key: str) -> list[Table]:
        """A list of tables; nothing where there is none."""
        values = self.take(key, "a list of tables", [])
        if not isinstance(values, list) or not all(isinstance(v, dict) for v in values):
            self.fail(key, f"wanted a list of tables, got {values!r:.60}")
        return [
            Table(self.file, f"{self.place}{key}[{i}].", value)
            for i, value in enumerate(values)
        ]

    def done(self, make: Callable[..., Made], **fields: Any) -> Made:
        """``make(**fields)``, after refusing keys that nobody took."""
        for key in self._left:
            self.fail(key, f"unknown, wanted one of {', '.join(sorted(self._known))}")
        try:
            return make(**fields)
        except InvalidProblemError as error:
            place = f" {self.place[:-1]}:" if self.place else ""
            raise InvalidProblemError(f"{self.file}:{place} {error}") from error


_SMALLEST = {Unit.BANDWIDTH: 1e3, Unit.RATE: 1e6}
"""Less is a number of gigabytes or teraflops whose unit was forgotten."""


def _range(unit: Unit) -> str:
    if unit in _SMALLEST:
        return f"at least {_SMALLEST[unit]:g} {unit.value} (was the unit forgotten?)"
    return "not negative and finite"
