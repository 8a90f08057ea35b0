"""Options of the joint planner."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from moetuner._checks import is_number, is_whole, one_of
from moetuner.errors import SolverError
from moetuner.placement.model import Placement  # noqa: TC001 (files are read by them)
from moetuner.solver.joint.profiles import Favour
from moetuner.solver.joint.scenarios import SearchProfile  # noqa: TC001

MOST_COPY_WEIGHT = 1e6
"""More drowns all else in rounding."""


@dataclass(frozen=True, kw_only=True, slots=True)
class JointConfig:
    """Options of `JointSolver` alone.

    Parameters
    ----------
    favour
        What decides where the time leaves a choice.
    copy_weight
        What copies count with `Favour.COPIES`: the more, the less even the loads.
    profile
        What is searched for beside the time; None: chosen by cross-validation on the
        planning data where there is time for it, for `Favour.TIME`.
    stay, move_seconds
        A placement that is in use, and by how many seconds of the objective every copy
        that a rank must fetch has to shorten it.
    rounds
        Rounds of annealing in each phase; 0 lets the clock decide, and only then can a
        slower machine find something else.
    patience
        End a phase after so many rounds that improved nothing.
    """

    favour: Favour = Favour.TIME
    copy_weight: float = 1.0
    profile: SearchProfile | None = None
    stay: Placement | None = None
    move_seconds: float = 0.0
    rounds: int = 0
    patience: int = 3

    def __post_init__(self) -> None:
        favour = one_of(Favour, self.favour, "JointConfig: favour")
        object.__setattr__(self, "favour", favour)
        if not is_number(self.move_seconds) or not 0 <= self.move_seconds < np.inf:
            raise SolverError(
                f"JointConfig: move_seconds must be >= 0 s, got {self.move_seconds!r}"
            )
        if (
            not is_number(self.copy_weight)
            or not 0 < self.copy_weight <= MOST_COPY_WEIGHT
        ):
            raise SolverError(
                f"JointConfig: copy_weight must be > 0 and at most "
                f"{MOST_COPY_WEIGHT:g}, got {self.copy_weight!r}"
            )
        for name, least in (("rounds", 0), ("patience", 1)):
            value = getattr(self, name)
            if not is_whole(value) or value < least:
                raise SolverError(
                    f"JointConfig: {name} must be a whole number >= {least}, got "
                    f"{value!r}"
                )
