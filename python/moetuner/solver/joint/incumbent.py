"""The best placement that a search has found so far."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np

from moetuner.placement.moves import fetched_replicas

if TYPE_CHECKING:
    from moetuner.placement.model import Placement
    from moetuner.problem import PlacementProblem


@dataclass(kw_only=True)
class Incumbent:
    """The best placement so far, by the problem's own objective and what moves cost."""

    problem: PlacementProblem
    stay: Placement | None = None
    move_seconds: float = 0.0
    placement: Placement = field(init=False)
    value: float = np.inf
    """The objective, and the cost of the moves."""
    bound: float | None = None
    floor: float = np.inf
    """Value of the quick methods, which no other placement may exceed."""
    longest: float = 0.0
    """Seconds of the slowest valuation so far: replicas take longer."""

    @property
    def objective(self) -> float | None:
        """The objective alone; None where the value holds more than that."""
        return self.value if self.stay is None else None

    def value_of(self, placement: Placement) -> float:
        """The objective, and the cost of the moves."""
        began = time.monotonic()
        value = self.problem.objective_value(placement)
        if self.stay is not None:
            moved = fetched_replicas(self.stay, placement)
            value += self.move_seconds * moved.size
        self.longest = max(self.longest, time.monotonic() - began)
        return value

    def offer(self, placement: Placement, value: float | None = None) -> None:
        """Take `placement` when it is better; a `value` that is known is taken."""
        if value is None:
            value = self.value_of(placement)
        if value < self.value:
            self.placement, self.value = placement, value

    def prefer(self, placement: Placement, value: float | None = None) -> None:
        """Take what a search prefers, for it looks further than at the value alone.

        A `value` that is known already, as `value_of` has it, is taken.
        """
        if value is None:
            value = self.value_of(placement)
        if value <= self.floor:
            self.placement, self.value = placement, value
