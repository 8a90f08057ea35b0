"""Colours that differ in lightness too: for colour-blind eyes, and for grey prints."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import NDArray

BEFORE = "#c2570c"
AFTER = "#1f5fa8"
OTHER = "#64748b"
PARTS = ("#1f5fa8", "#8fb8de", "#f0b862")
"""Three parts of a whole, from dark to light."""
STEPS = 128


def _ramp(*anchors: str) -> NDArray[np.uint8]:
    """Colours between anchors at equal distances, uint8 [STEPS, 3]."""
    points = np.array([[int(a[i : i + 2], 16) for i in (1, 3, 5)] for a in anchors])
    at = np.linspace(0, len(anchors) - 1, STEPS)
    channels = [np.interp(at, np.arange(len(anchors)), p) for p in points.T]
    return np.round(np.stack(channels, axis=1)).astype(np.uint8)


# Light is little: white paper stays white, and lightness falls all the way.
_MORE = _ramp(
    "#f7fafd", "#d3e3f3", "#9cc3e4", "#5b9bd0", "#2a6fb5", "#134a86", "#06254d"
)
# White is even; blue is less, orange is more: no red beside green.
_AROUND = _ramp(
    "#123f75", "#2f73b4", "#86b6dc", "#d6e6f3", "#fbfbfb",
    "#fde3c4", "#f5b26b", "#d9731f", "#8a3a05",
)  # fmt: skip
NOTHING = (222, 226, 232)
"""Where there is no value."""


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Scale:
    """Colours of the values from `low` to `high`; what lies outside gets the ends."""

    low: float
    high: float
    ramp: NDArray[np.uint8]
    label: str

    def index(self, values: NDArray[np.float64]) -> NDArray[np.uint8]:
        """Palette entry of each value; `STEPS` where it is NaN."""
        share = (values - self.low) / ((self.high - self.low) or 1)
        steps = np.clip(np.nan_to_num(share) * STEPS, 0, STEPS - 1).astype(np.uint8)
        return np.where(np.isfinite(values), steps, np.uint8(STEPS))

    def is_dark(self, value: float) -> bool:
        """Whether writing on the value's colour should be white."""
        red, green, blue = self.ramp[int(self.index(np.array([value]))[0])]
        return bool(0.299 * red + 0.587 * green + 0.114 * blue < 140)


def scale_from_zero(*tables: NDArray[np.float64], label: str, cap: float = 1) -> Scale:
    """Light at 0, dark at the largest value, or at the quantile `cap` of all."""
    values = np.concatenate([table[np.isfinite(table)].ravel() for table in tables])
    high = float(np.quantile(values, cap)) if values.size else 0.0
    return Scale(low=0.0, high=high or 1.0, ramp=_MORE, label=label)


def scale_around(
    center: float, *tables: NDArray[np.float64], label: str, least: float = 0.1
) -> Scale:
    """White at `center`, as far to either side as the values go.

    Values that differ by less than the share `least` of the centre stay pale.
    """
    values = np.concatenate([table[np.isfinite(table)].ravel() for table in tables])
    most = float(np.abs(values - center).max()) if values.size else 0.0
    spread = max(least * center, most) or 1.0
    low, high = center - spread, center + spread
    return Scale(low=low, high=high, ramp=_AROUND, label=label)
