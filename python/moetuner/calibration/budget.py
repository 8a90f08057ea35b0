"""A stretch of time, shared out beforehand: what no longer fits is left out."""

from __future__ import annotations

import enum
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable

MIN_POINTS = 2
"""Of a series, whatever the time: fewer cannot tell a latency from a rate."""
_OF_CASES = 0.5  # of a part's time
MIN_CALLS = 4
"""Of a case: one that warms up, and three that count."""


class Part(str, enum.Enum):
    """What is measured one after another."""

    LINKS = "links"
    COLLECTIVES = "collectives"
    EXCHANGE = "exchange"
    EXPERTS = "experts"
    PERMUTE = "permute"


SHARES = {
    Part.LINKS: 0.15,
    Part.COLLECTIVES: 0.1,
    Part.EXCHANGE: 0.45,
    Part.EXPERTS: 0.2,
    Part.PERMUTE: 0.1,
}
"""Of all the time; the exchange has the most cases."""


@dataclass
class Allowance:
    """The time of one part.

    Sizes of a series come in rising order. One that would not fit any more is left out,
    and so are all larger ones of that series. ``clock`` tells the seconds since the
    part began, and must tell the same on every rank.
    """

    seconds: float
    num_cases: int
    clock: Callable[[], float]
    _known: dict[str, list[tuple[float, float]]] = field(default_factory=dict)
    left_out: dict[str, str] = field(default_factory=dict)
    """Series, and what was left out of it for want of what."""

    @property
    def case_seconds(self) -> float:
        """For the repetitions of one case, before the large ones, which need more."""
        return _OF_CASES * self.seconds / max(self.num_cases, 1)

    def has_room(self, series: str, size: float) -> bool:
        """Whether the next case of a series, of that size, shall be measured."""
        known = self._known.get(series, [])
        if series in self.left_out:
            return False
        if len(known) < MIN_POINTS:
            return True
        last_size, last_seconds = known[-1]
        expected = MIN_CALLS * last_seconds * max(size / last_size, 1.0)
        if self.clock() + expected <= self.seconds:
            return True
        self.leave_out(series, size, "time")
        return False

    def knows(self, series: str) -> bool:
        """Whether anything of the series was measured."""
        return series in self._known

    def leave_out(self, series: str, size: float, want: str) -> None:
        """Measure nothing of that size and above, for `want` of something."""
        self.left_out[series] = (
            f"nothing of size {size:g} and above, for want of {want}"
        )

    def give_up(self, series: str, why: str) -> None:
        """Measure nothing of a series at all."""
        self.left_out[series] = why

    def took(self, series: str, size: float, seconds: float) -> None:
        """Remember what a call of that size took."""
        self._known.setdefault(series, []).append((size, seconds))
