"""Loads that are no whole numbers, as counts.

A mean over the last n steps is a whole number of n-ths: where all loads are, they are
counts again, of n times the steps. Other averages are rounded, after scaling them to a
million choices a layer if they are smaller than that.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from moetuner._words import amount
from moetuner.errors import InvalidTraceError

if TYPE_CHECKING:
    from collections.abc import Callable

    from numpy.typing import NDArray

MAX_STEPS = 4096
"""Of a moving average that is read as the whole numbers it was made from."""
SCALED_TOTAL = 10**6
"""Choices of the fullest layer, where averages are of no whole numbers."""
_LARGEST = 2**40
_EXACT = 2**53


def whole_loads(
    loads: NDArray[Any], precision: float, note: Callable[[str], Any]
) -> NDArray[np.int64]:
    """Counts int64 in the proportions of `loads`, within and between groups.

    Parameters
    ----------
    loads
        float64 [Q, L, E], finite and >= 0.
    precision
        Relative error of each load, by the type that it was stored in.
    note
        Called with what was done.

    Raises
    ------
    InvalidTraceError
        When they add up to more than a float holds.
    """
    largest = float(loads.max(initial=0.0))
    if not np.isfinite(largest):  # files of one group were added up
        raise InvalidTraceError("weights must add up to finite numbers")
    if largest <= _EXACT and (loads == np.floor(loads)).all():
        return np.asarray(loads, np.int64)
    steps = _steps(loads, precision)
    if steps is not None:
        note(f"weights are averages over {amount(steps, 'step')}: read as their sums")
        return np.asarray(np.rint(loads * steps), np.int64)
    shares = loads / largest  # whose sums neither overflow nor vanish
    total = float(shares.sum(axis=2).max())
    scale = max(SCALED_TOTAL / total, largest) if largest < _LARGEST else 0.0
    scale = scale or SCALED_TOTAL / total
    note("weights are averages: scaled and rounded to whole numbers")
    return np.asarray(np.rint(shares * scale), np.int64)


def _steps(loads: NDArray[Any], precision: float) -> int | None:
    """The smallest number that makes all loads whole, within their precision."""
    values = np.unique(loads[loads > 0])
    if values[0] < 1 / MAX_STEPS or values[-1] > _LARGEST:
        return None
    sample = values[:: max(len(values) // 512, 1)]
    for steps in range(2, MAX_STEPS + 1):
        if _whole(sample * steps, precision) and _whole(values * steps, precision):
            return steps
    return None


def _whole(values: NDArray[Any], precision: float) -> bool:
    allowed = 4 * precision * values + 1e-9
    if allowed.max() > 0.05:  # anything would be whole
        return False
    return bool((np.abs(values - np.rint(values)) <= allowed).all())
