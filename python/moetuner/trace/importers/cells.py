"""Values of a table's cells, as numbers in arrays."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any

import numpy as np

from moetuner.errors import InvalidTraceError
from moetuner.trace.importers.base import whole
from moetuner.trace.model import MAX_EXPERTS, PADDING

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

_LIST = re.compile(r"[\s\[\](){},;|:\d.eE+-]*")
_INTEGER = re.compile(r"[+-]?\d+(?:\.0*)?(?![\d.])")
_REAL = re.compile(r"[+-]?\d+(?:\.\d*)?(?:[eE][+-]?\d+)?")
_DECODE = {"decode", "decoding", "generation", "generate", "1", "true"}
_PREFILL = {"prefill", "extend", "prompt", "context", "0", "false"}


def integer(value: Any, what: str, low: int = 0, high: int = 1 << 31) -> int:
    """A whole number of a cell.

    Raises
    ------
    InvalidTraceError
        When it is none, or outside `low`..`high` - 1.
    """
    number: Any = value
    if isinstance(value, str) and _INTEGER.fullmatch(value.strip()):
        number = int(value.strip().partition(".")[0])
    if isinstance(number, float) and number.is_integer():
        number = int(number)
    if not isinstance(number, int) or isinstance(number, bool):
        raise InvalidTraceError(f"{what} must be a whole number, got {value!r:.40}")
    if not low <= number < high:
        raise InvalidTraceError(f"{what} must be {low}..{high - 1}, got {number}")
    return number


def listed(value: Any, what: str) -> list[Any]:
    """The numbers of a list, or of text like ``[1, 2]`` or ``1;2``."""
    if isinstance(value, str):
        if not _LIST.fullmatch(value):
            raise InvalidTraceError(f"{what} must be a list, got {value!r:.40}")
        return [float(n) if not n.lstrip("+-").isdigit() else int(n)
                for n in _REAL.findall(value)]  # fmt: skip
    if isinstance(value, np.ndarray):
        return list(value.tolist())
    if isinstance(value, tuple | list):
        return list(value)
    return [value]


def expert_rows(rows: Sequence[Sequence[Any]]) -> NDArray[np.int16]:
    """Lists of ids as int16 [rows, widest], padded with -1."""
    width = max(map(len, rows), default=0)
    if not 1 <= width <= MAX_EXPERTS:
        raise InvalidTraceError(f"a route must list 1..{MAX_EXPERTS} experts")
    table = np.full((len(rows), width), PADDING, np.int16)
    try:
        flat = np.array([number for row in rows for number in row])
    except (ValueError, OverflowError) as error:
        raise InvalidTraceError(f"expert ids must be integers: {error}") from error
    flat = whole(flat)
    if flat.size and (flat.dtype.kind not in "iu" or flat.ndim != 1):
        raise InvalidTraceError(f"expert ids must be integers, got {flat.dtype}")
    if flat.size and (flat.min() < PADDING or flat.max() >= MAX_EXPERTS):
        raise InvalidTraceError(
            f"expert ids must be -1..{MAX_EXPERTS - 1}, got {flat.min()}..{flat.max()}"
        )
    lengths = np.array([len(row) for row in rows])
    table[np.arange(width) < lengths[:, None]] = flat
    return table


def weight_rows(rows: Sequence[Sequence[Any]], width: int) -> NDArray[np.float32]:
    """Lists of weights as float32 [rows, width], 0 where a row is shorter."""
    table = np.zeros((len(rows), width), np.float32)
    for number, row in enumerate(rows):
        try:
            values = np.array(row, np.float64)
        except (ValueError, TypeError, OverflowError) as error:
            raise InvalidTraceError(f"weights must be numbers: {error}") from error
        if values.ndim != 1 or len(values) > width:
            raise InvalidTraceError("more weights than experts in a route")
        if values.size and (
            not np.isfinite(values).all() or np.abs(values).max() > 1e30
        ):
            raise InvalidTraceError("weights must be finite numbers")
        table[number, : len(values)] = values
    return table


def is_decode(value: Any, name: str) -> int | None:
    """1 for a phase that decodes, 0 for prefill; None when it says neither."""
    text = str(value).strip().lower()
    flipped = "prefill" in name.lower()
    if text in _DECODE:
        return int(not flipped)
    if text in _PREFILL:
        return int(flipped)
    return None
