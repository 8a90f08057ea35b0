"""What every solver takes and gives back.

Legend: L layers, E experts, G ranks; ``rank_of`` is the rank of each expert, [L, E].
"""

from __future__ import annotations

import enum
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Protocol

from moetuner._checks import is_number, is_whole
from moetuner.errors import SolverError
from moetuner.placement.model import Placement, Provenance

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from moetuner.problem import Objective, PlacementProblem


class SolveStatus(str, enum.Enum):
    """How a solve ended."""

    OPTIMAL = "optimal"
    """The lower bound meets the value (within the solver's stated tolerance)."""
    HEURISTIC = "heuristic"
    """The method ran to its end; it proves no optimum by itself."""
    TIME_LIMIT = "time_limit"
    """Best found when the time was up; the gap says how far it may be."""
    INTERRUPTED = "interrupted"
    """Best found when the user stopped it."""
    FAILED = "failed"
    """Best known when the solver's own process died."""


@dataclass(frozen=True, kw_only=True, slots=True)
class SolverOptions:
    """Limits and seed of a solve.

    Parameters
    ----------
    time_limit
        Seconds of wall time; a solver returns its best by then.
    seed
        Seed of everything random.
    threads
        Processes or threads to use; 0 means all cores.

    Raises
    ------
    SolverError
        When the limit is not positive, or seed or threads are negative.
    """

    time_limit: float = 60.0
    seed: int = 0
    threads: int = 0

    def __post_init__(self) -> None:
        if not is_number(self.time_limit) or not self.time_limit > 0:
            raise SolverError(
                f"SolverOptions: time_limit must be > 0 s, got {self.time_limit!r}"
            )
        for name in ("seed", "threads"):
            value = getattr(self, name)
            if not is_whole(value) or value < 0:
                raise SolverError(
                    f"SolverOptions: {name} must be a whole number >= 0, got {value!r}"
                )

    def round_seed(self, number: int) -> int:
        """A seed of its own for each round of a search."""
        return self.seed * 1_000_003 + number


@dataclass(frozen=True, kw_only=True, slots=True)
class Stage:
    """One step of a solver, with its own objective."""

    name: str
    objective: Objective
    value: float
    lower_bound: float | None
    status: SolveStatus
    seconds: float

    @property
    def gap(self) -> float | None:
        """(value - bound) / value, 0 when both are 0; None without a bound."""
        return relative_gap(self.value, self.lower_bound)


@dataclass(frozen=True, kw_only=True, slots=True)
class Solution:
    """A placement and what its solver can say of it.

    ``value`` is `PlacementProblem.objective_value` of the placement, recomputed.
    ``lower_bound`` holds for every placement that answers the problem, or is None.
    """

    placement: Placement
    objective: Objective
    value: float
    lower_bound: float | None
    status: SolveStatus
    seconds: float
    stages: tuple[Stage, ...] = ()

    @property
    def gap(self) -> float | None:
        """(value - bound) / value, 0 when both are 0; None without a bound."""
        return relative_gap(self.value, self.lower_bound)


@dataclass(frozen=True, kw_only=True, slots=True)
class ProgressEvent:
    """News from a running solver; ``incumbent`` and ``bound`` are of the stage."""

    solver: str
    stage: str
    done: int
    total: int
    incumbent: float | None = None
    bound: float | None = None
    seconds: float = 0.0


ProgressCallback = Callable[[ProgressEvent], None]


@dataclass(frozen=True, kw_only=True, slots=True)
class NoConfig:
    """The options of a solver that has none of its own."""


NO_CONFIG = NoConfig()


class Solver(Protocol):
    """A way to answer a placement problem; a frozen dataclass."""

    @property
    def config(self) -> Any:
        """Its own options, a frozen dataclass."""

    @property
    def name(self) -> str:
        """Name in the registry."""

    @property
    def objectives(self) -> tuple[Objective, ...]:
        """Objectives that it minimises; the first is its own."""

    def solve(
        self,
        problem: PlacementProblem,
        options: SolverOptions = ...,
        *,
        warm_start: Placement | None = None,
        progress: ProgressCallback | None = None,
    ) -> Solution:
        """Return the best placement found; never worse than ``warm_start``."""


@dataclass(kw_only=True, slots=True)
class Clock:
    """Wall time since a solve began, and what is left of its limit."""

    time_limit: float
    started: float = field(default_factory=lambda: time.monotonic())

    @property
    def seconds(self) -> float:
        """Seconds so far."""
        return time.monotonic() - self.started

    @property
    def left(self) -> float:
        """Seconds left, at least 0."""
        return max(self.time_limit - self.seconds, 0.0)


def check_objective(solver: Solver, problem: PlacementProblem) -> None:
    """Refuse a problem whose objective the solver does not minimise."""
    if problem.objective not in solver.objectives:
        wanted = ", ".join(objective.value for objective in solver.objectives)
        raise SolverError(
            f"solver {solver.name} minimises {wanted}; the problem asks for "
            f"{problem.objective.value}"
        )


def place(problem: PlacementProblem, rank_of: NDArray[np.integer[Any]]) -> Placement:
    """The placement of `rank_of` [L, E] in the problem's slots."""
    return Placement.from_rank_of(
        rank_of,
        layer_ids=problem.statistics.layer_ids,
        topology=problem.topology,
        slots_per_rank=problem.slots_per_rank,
    )


def finish(
    solver: Solver,
    problem: PlacementProblem,
    found: NDArray[np.integer[Any]] | Placement,
    clock: Clock,
    *,
    status: SolveStatus,
    lower_bound: float | None = None,
    stages: tuple[Stage, ...] = (),
    warm_start: Placement | None = None,
    value: float | None = None,
) -> Solution:
    """The solution for `found`, or for the warm start where that is better.

    `found` is a placement or the rank of each expert, [L, E].

    The value is recomputed by the problem, unless it is given: of a large placement
    that takes seconds, which are not there after a Ctrl-C. A bound above it would be a
    false proof and is an error.
    """
    placement = found if isinstance(found, Placement) else place(problem, found)
    if value is None:
        value = problem.objective_value(placement)
    if warm_start is not None:
        warm_value = problem.objective_value(warm_start)
        if warm_value < value:
            placement, value = warm_start, warm_value
    tolerance = 1e-9 + 1e-6 * abs(value)
    if lower_bound is not None:
        if lower_bound > value + tolerance:
            raise SolverError(
                f"solver {solver.name}: claimed bound {lower_bound} exceeds the value "
                f"{value} of its own placement; please report this"
            )
        lower_bound = min(lower_bound, value)
        if value - lower_bound <= tolerance and status is not SolveStatus.INTERRUPTED:
            status = SolveStatus.OPTIMAL
    seconds = clock.seconds
    provenance = Provenance(
        solver=solver.name,
        objective=problem.objective.value,
        value=value,
        lower_bound=lower_bound,
        status=status.value,
        seconds=round(seconds, 3),
    )
    return Solution(
        placement=replace(placement, provenance=provenance),
        objective=problem.objective,
        value=value,
        lower_bound=lower_bound,
        status=status,
        seconds=seconds,
        stages=stages,
    )


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Answer:
    """What a heuristic found, a placement or ranks [L, E], and what it knows of it."""

    found: NDArray[np.integer[Any]] | Placement
    lower_bound: float | None = None
    stages: tuple[Stage, ...] = ()


class Heuristic(ABC):
    """A solver that has one answer and proves no optimum; see `Solver`.

    A heuristic is a frozen dataclass with ``config``, ``name`` and ``objectives`` that
    says how it finds its `answer`.
    """

    __slots__ = ()
    config: Any
    name: str
    objectives: tuple[Objective, ...]

    @abstractmethod
    def answer(
        self, problem: PlacementProblem, options: SolverOptions, clock: Clock
    ) -> Answer:
        """Find it; the objective is one of its own."""

    def solve(
        self,
        problem: PlacementProblem,
        options: SolverOptions = SolverOptions(),
        *,
        warm_start: Placement | None = None,
        progress: ProgressCallback | None = None,  # noqa: ARG002
    ) -> Solution:
        """See `Solver`."""
        check_objective(self, problem)
        clock = Clock(time_limit=options.time_limit)
        answer = self.answer(problem, options, clock)
        return finish(
            self,
            problem,
            answer.found,
            clock,
            status=SolveStatus.HEURISTIC,
            lower_bound=answer.lower_bound,
            stages=answer.stages,
            warm_start=warm_start,
        )


def interrupted(solution: Solution) -> Solution:
    """The same, known to have been stopped by the user."""
    status = SolveStatus.INTERRUPTED
    told = replace(solution.placement.provenance, status=status.value)
    placement = replace(solution.placement, provenance=told)
    return replace(solution, placement=placement, status=status)


def worst_status(states: Iterable[SolveStatus]) -> SolveStatus:
    """How a solve of several parts ended; optimal when every part is."""
    order = (
        SolveStatus.INTERRUPTED,
        SolveStatus.FAILED,
        SolveStatus.TIME_LIMIT,
        SolveStatus.HEURISTIC,
    )
    found = set(states)
    return next((status for status in order if status in found), SolveStatus.OPTIMAL)


def relative_gap(value: float, bound: float | None) -> float | None:
    """(value - bound) / |value|; 0 when they are equal, None without a bound."""
    if bound is None:
        return None
    return 0.0 if value <= bound else (value - bound) / max(abs(value), 1e-300)
