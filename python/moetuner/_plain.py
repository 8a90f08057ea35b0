"""Dataclasses as plain JSON values, and back: what provenance is written in."""

from __future__ import annotations

import dataclasses
import enum
import types
import typing
from typing import Any, TypeVar

from moetuner._checks import is_number, is_whole
from moetuner.errors import InvalidProblemError

Kind = TypeVar("Kind")


def to_plain(value: Any) -> Any:
    """`value` with dataclasses as dicts, enums as their values, tuples as lists.

    What has a ``sha256()``, a placement or a trace, is named by that. Fields that
    follow from others (``init=False``) are left out.
    """
    if isinstance(value, enum.Enum):
        return value.value
    if value is None or isinstance(value, (bool, str)):
        return value
    if is_whole(value):
        return int(value)
    if is_number(value):
        return float(value)
    if callable(getattr(value, "sha256", None)):
        return {"sha256": value.sha256()}
    if dataclasses.is_dataclass(value):
        own = (each.name for each in dataclasses.fields(value) if each.init)
        return {name: to_plain(getattr(value, name)) for name in own}
    if isinstance(value, (list, tuple)):
        return [to_plain(each) for each in value]
    raise TypeError(f"to_plain: a {type(value).__name__} has no plain form")


def from_plain(kind: type[Kind], value: Any, where: str) -> Kind:
    """The dataclass `kind` that `value` was made of by `to_plain`.

    Fields that are missing keep their defaults; keys that `kind` does not have are
    passed over.

    Raises
    ------
    InvalidProblemError
        When a value is not of its field's type, or the dataclass refuses it; `where`
        says what was read.
    """
    found: Kind = _read(kind, value, where)
    return found


def _read(kind: Any, value: Any, where: str) -> Any:
    origin, inner = typing.get_origin(kind), typing.get_args(kind)
    if origin in (typing.Union, types.UnionType):
        if value is None and type(None) in inner:
            return None
        kinds = [each for each in inner if each is not type(None)]
        # Of a dataclass and a number that stands for one, a dict is the dataclass.
        kinds.sort(key=lambda k: dataclasses.is_dataclass(k) != isinstance(value, dict))
        return _read(kinds[0], value, where)
    if dataclasses.is_dataclass(kind) and isinstance(value, dict):
        return _read_fields(kind, value, where)
    if origin is tuple and isinstance(value, list):
        return tuple(_read(inner[0], each, where) for each in value)
    if isinstance(kind, type) and issubclass(kind, enum.Enum):
        if value in [each.value for each in kind]:
            return kind(value)
    elif (
        (kind is float and is_number(value))
        or (kind is int and is_whole(value))
        or (kind in (str, bool) and isinstance(value, kind))
    ):
        return kind(value)
    name = getattr(kind, "__name__", str(kind))
    raise InvalidProblemError(f"{where}: wanted {name}, got {value!r:.60}")


def _read_fields(kind: Any, value: dict[str, Any], where: str) -> Any:
    hints = typing.get_type_hints(kind)
    given = {
        each.name: _read(hints[each.name], value[each.name], f"{where}.{each.name}")
        for each in dataclasses.fields(kind)
        if each.init and each.name in value
    }
    try:
        return kind(**given)
    except TypeError as error:
        raise InvalidProblemError(f"{where}: {error}") from error
