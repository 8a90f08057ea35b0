"""The course of a solve, kept small: what changed, and when."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from moetuner.placement.model import ProgressPoint

if TYPE_CHECKING:
    from moetuner.solver.base import ProgressCallback, ProgressEvent

MAX_POINTS = 200
"""Kept of each stage; where more came, every second one in the middle goes."""


@dataclass(kw_only=True, slots=True)
class History:
    """A progress callback that keeps what it is told, and passes it on."""

    forward: ProgressCallback | None = None
    _began: float = field(default_factory=time.monotonic)
    _stages: dict[str, list[ProgressPoint]] = field(default_factory=dict)

    def __call__(self, event: ProgressEvent) -> None:
        """Keep the event if it changes the incumbent or the bound of its stage."""
        if self.forward is not None:
            self.forward(event)
        points = self._stages.setdefault(event.stage, [])
        news = (event.incumbent, event.bound)
        if news == (None, None):
            return
        if points and (points[-1].incumbent, points[-1].bound) == news:
            return
        if len(points) >= MAX_POINTS:
            points[:] = points[::2]
        points.append(
            ProgressPoint(
                stage=event.stage,
                seconds=round(time.monotonic() - self._began, 3),
                incumbent=event.incumbent,
                bound=event.bound,
            )
        )

    def points(self) -> tuple[ProgressPoint, ...]:
        """All that was kept, stage after stage."""
        return tuple(point for points in self._stages.values() for point in points)
