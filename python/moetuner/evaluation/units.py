"""Quantities as people write them: "450 GB/s", "11.8 us", "989 TFLOP/s"."""

from __future__ import annotations

import enum
import re
from decimal import Decimal, InvalidOperation
from fractions import Fraction
from typing import Any

from moetuner._checks import is_number


class Unit(enum.Enum):
    """What a number counts when no unit is written."""

    BANDWIDTH = "bytes/s"
    RATE = "FLOP/s"
    TIME = "s"
    TIME_PER_BYTE = "s/byte"


_PREFIXES = {"": 0, "k": 3, "M": 6, "G": 9, "T": 12, "P": 15}
_TIMES = {"s": 0, "ms": -3, "us": -6, "µs": -6, "ns": -9, "ps": -12}
_SPELLED: dict[Unit, dict[str, Fraction]] = {
    Unit.BANDWIDTH: {
        **{f"{p}B/s": Fraction(10) ** n for p, n in _PREFIXES.items()},
        **{
            f"{p}{bits}": Fraction(10) ** n / 8
            for p, n in _PREFIXES.items()
            for bits in ("b/s", "bit/s", "bps")
        },
    },
    Unit.RATE: {f"{p}FLOP/s": Fraction(10) ** n for p, n in _PREFIXES.items()},
    Unit.TIME: {name: Fraction(10) ** n for name, n in _TIMES.items()},
    Unit.TIME_PER_BYTE: {f"{t}/byte": Fraction(10) ** n for t, n in _TIMES.items()},
}
_EXAMPLE = {
    Unit.BANDWIDTH: '"450 GB/s" or "400 Gb/s"',
    Unit.RATE: '"989 TFLOP/s"',
    Unit.TIME: '"11.8 us"',
    Unit.TIME_PER_BYTE: '"0.5 ps/byte"',
}


def wanted(unit: Unit) -> str:
    """What is accepted, for error messages."""
    return f"a number in {unit.value}, or text such as {_EXAMPLE[unit]}"


def quantity(value: Any, unit: Unit) -> float | None:
    """`value` in `unit`, correctly rounded; None when it is no such quantity."""
    if is_number(value):
        return float(value)
    if not isinstance(value, str):
        return None
    match = re.fullmatch(r"\s*([0-9.eE+-]+)\s*(\S+)\s*", value)
    factor = _SPELLED[unit].get(match[2]) if match else None
    if match is None or factor is None:
        return None
    try:
        number = Decimal(match[1])
    except InvalidOperation:
        return None
    if abs(number.adjusted()) > 30:  # nothing that a machine has
        return None
    return float(Fraction(number) * factor)
