"""Colours that differ in lightness too: for colour-blind eyes, and for grey prints."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import NDArray

STEPS = 128


def _ramp(*anchors: str) -> NDArray[np.uint8]:
    """Colours between anchors at equal distances, uint8 [STEPS, 3]."""
    points = np.array([[int(a[i : i + 2], 16) for i in (1, 3, 5)] for a in anchors])
    at = np.linspace(0, len(anchors) - 1, STEPS)
    channels = [np.interp(at, np.arange(len(anchors)), p) for p in points.T]
    return np.round(np.stack(channels, axis=1)).astype(np.uint8)


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Ramp:
    """Colours of rising values, uint8 [STEPS + 1, 3]; the last is of no value."""

    day: NDArray[np.uint8]
    night: NDArray[np.uint8]

    @classmethod
    def of(cls, day: tuple[str, ...], night: tuple[str, ...]) -> Ramp:
        """Through these anchors."""
        return cls(
            day=np.vstack([_ramp(*day), _ramp("#dee2e8")[:1]]),
            night=np.vstack([_ramp(*night), _ramp("#3a4250")[:1]]),
        )


# Little is as the paper, and lightness goes one way: down by day, up by night.
_MORE = Ramp.of(
    ("#f7fafd", "#d3e3f3", "#9cc3e4", "#5b9bd0", "#2a6fb5", "#134a86", "#06254d"),
    ("#1b2230", "#143a66", "#1f5c9c", "#3f86c9", "#78b0e3", "#b2d4f3", "#eaf4fe"),
)
# As the paper is even; blue is less, orange is more: no red beside green.
_AROUND = Ramp.of(
    (
        *("#123f75", "#2f73b4", "#86b6dc", "#d6e6f3", "#fbfbfb"),
        *("#fde3c4", "#f5b26b", "#d9731f", "#8a3a05"),
    ),
    (
        *("#b9dbfa", "#6fb0ec", "#2f73b4", "#1d3f66", "#1d222b"),
        *("#55330f", "#a35a14", "#e5923f", "#fdd5a6"),
    ),
)


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Scale:
    """Colours of the values from `low` to `high`; what lies outside gets the ends."""

    low: float
    high: float
    ramp: Ramp
    label: str

    def index(self, values: NDArray[np.float64]) -> NDArray[np.uint8]:
        """Palette entry of each value; `STEPS` where it is NaN."""
        share = (values - self.low) / ((self.high - self.low) or 1)
        steps = np.clip(np.nan_to_num(share) * STEPS, 0, STEPS - 1).astype(np.uint8)
        return np.where(np.isfinite(values), steps, np.uint8(STEPS))

    def wants_white(self, value: float, *, night: bool = False) -> bool:
        """Whether white is easier to read on the value's colour than black.

        The better of the two has a contrast of at least 4.58, by WCAG 2.2.
        """
        ramp = self.ramp.night if night else self.ramp.day
        behind = luminance(ramp[int(self.index(np.array([value]))[0])])
        return contrast(1.0, behind) > contrast(behind, 0.0)


def luminance(color: NDArray[np.uint8]) -> float:
    """Relative luminance of sRGB [3], 0 to 1; WCAG 2.2, "relative luminance"."""
    share = color / 255
    linear = np.where(share <= 0.04045, share / 12.92, ((share + 0.055) / 1.055) ** 2.4)
    return float(linear @ np.array([0.2126, 0.7152, 0.0722]))


def contrast(lighter: float, darker: float) -> float:
    """Contrast of two luminances; WCAG 2.2, "contrast ratio"."""
    return (lighter + 0.05) / (darker + 0.05)


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
