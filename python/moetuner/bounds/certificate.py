"""A lower bound of the modelled time of every placement, and the gap of one."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from moetuner._checks import is_number
from moetuner.bounds.counting import Counting
from moetuner.bounds.pieces import Cutter
from moetuner.bounds.pool import bound_pieces
from moetuner.errors import InvalidProblemError, SolverError
from moetuner.problem import Objective

if TYPE_CHECKING:
    from collections.abc import Callable

    from numpy.typing import NDArray

    from moetuner.placement.model import Placement
    from moetuner.problem import PlacementProblem

    Floats = NDArray[np.float64]


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Certificate:
    """What is proven of a problem's modelled time, in seconds.

    Parameters
    ----------
    lower_bound
        No placement that answers the problem is faster.
    counting_bound
        The part of that which needs no search.
    value
        Modelled time of the placement that was certified, or None.
    pieces
        float64, bounds of the single pieces; they add up to ``lower_bound``.
    replicas
        Whether the bound also holds for placements with replicas.
    seconds
        Wall time that it took.
    """

    lower_bound: float
    counting_bound: float
    value: float | None
    pieces: Floats
    replicas: bool
    seconds: float

    @property
    def gap(self) -> float | None:
        """(value - bound) / value; None without a placement."""
        if self.value is None:
            return None
        return 1 - self.lower_bound / self.value if self.value > 0 else 0.0

    def to_json(self) -> dict[str, Any]:
        """Plain numbers."""
        return {
            "lower_bound": self.lower_bound,
            "counting_bound": self.counting_bound,
            "value": self.value,
            "gap": self.gap,
            "replicas": self.replicas,
            "seconds": round(self.seconds, 3),
        }


def counting_bound(problem: PlacementProblem) -> float:
    """The quick part of `certify`: what counting alone proves, in seconds.

    It covers placements with replicas wherever the problem has slots for them.
    """
    replicas = problem.spare_slots > 0
    pieces = Cutter(problem, replicas=replicas, known=None).pieces()
    return float(sum(piece.least for piece in pieces)) * (1 - 1e-12)


def layer_counting_bounds(problem: PlacementProblem) -> Floats:
    """What counting proves of each layer without replicas, in seconds, float64 [L].

    Where homes do not follow: else a layer's time is not its own.
    """
    counting = Counting(problem, replicas=False)
    shares = [counting.shares(layer) for layer in range(problem.num_layers)]
    least = [sum(share.least for share in of_layer) for of_layer in shares]
    return np.array(least) * (1 - 1e-12)


def certify(
    problem: PlacementProblem,
    placement: Placement | None = None,
    *,
    time_limit: float = 60.0,
    threads: int = 0,
    replicas: bool | None = None,
    max_iterations: int = 2000,
    progress: Callable[[int, int, float], None] | None = None,
) -> Certificate:
    """Bound the modelled time of every placement that answers `problem` from below.

    Anytime: the bound holds however little time there is; more makes it larger.

    Parameters
    ----------
    problem
        With objective `Objective.MODELLED_TIME`.
    placement
        A good placement; its value gives the gap, and it helps to find the bound.
    time_limit
        Seconds for the search.
    threads
        Processes side by side; 0 means one per core.
    replicas
        Whether placements with replicas are to be covered: by default wherever the
        problem has slots for them. Such bounds come from counting alone.
    max_iterations
        Steps of each search at most.
    progress
        Called with (pieces done, pieces, bound so far).

    Raises
    ------
    InvalidProblemError
        When the objective is another, or the time limit is not positive.
    MissingStatisticsError
        When the wire needs tokens and a source only counted load.
    SolverError
        When a bound exceeds the value of `placement`: a defect of this package.
    """
    if problem.objective is not Objective.MODELLED_TIME:
        raise InvalidProblemError(
            f"certify: wanted objective {Objective.MODELLED_TIME.value}, got "
            f"{problem.objective.value}"
        )
    if not is_number(time_limit) or not time_limit > 0:
        raise InvalidProblemError(
            f"certify: time_limit must be > 0 s, got {time_limit!r}"
        )
    started = time.monotonic()
    if replicas is None:
        replicas = problem.spare_slots > 0
    value = None if placement is None else problem.objective_value(placement)
    pieces = Cutter(problem, replicas=replicas, known=placement).pieces()
    counted = np.array([piece.least for piece in pieces])
    best, done = counted.copy(), 0

    def report(index: int, bound: float) -> None:
        nonlocal done
        best[index] = bound
        done += 1
        if progress:
            progress(done, len(pieces), float(best.sum()))

    bounds = bound_pieces(
        pieces,
        deadline=started + time_limit,
        threads=threads,
        max_iterations=max_iterations,
        on_bound=report,
    )
    lower_bound = float(np.sum(bounds)) * (1 - 1e-12)  # of adding up
    if value is not None and lower_bound > value * (1 + 1e-9):
        raise SolverError(
            f"certify: the bound {lower_bound} s exceeds the value {value} s of a "
            f"placement; please report this"
        )
    return Certificate(
        lower_bound=lower_bound if value is None else min(lower_bound, value),
        counting_bound=float(counted.sum()) * (1 - 1e-12),
        value=value,
        pieces=np.array(bounds),
        replicas=replicas,
        seconds=time.monotonic() - started,
    )
