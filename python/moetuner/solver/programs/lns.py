"""Large-neighbourhood search with CBC: small exact programs of single layers.

From a placement, each layer in turn frees the experts on some of its ranks, and the
program of `moetuner.solver.programs.layer` finds the best places for them, the others
staying where they are. What is better by the problem's own objective is kept. A layer
of few experts is freed as a whole; its program is then a proof, and when every layer
has one their sum bounds every placement. See ``docs/planning.md`` for when it pays.
"""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np

from moetuner._checks import is_number, is_whole
from moetuner.errors import SolverError
from moetuner.evaluation.cost import Homes
from moetuner.problem import Objective
from moetuner.solver.base import (
    Clock,
    ProgressCallback,
    ProgressEvent,
    Solution,
    SolverOptions,
    SolveStatus,
    Stage,
    check_objective,
    finish,
    place,
)
from moetuner.solver.heuristics.starts import quick_placements
from moetuner.solver.programs.cbc import MilpResult, solve_milps
from moetuner.solver.programs.neighbourhoods import LayerSearch
from moetuner.trace import Trace

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from moetuner.placement.model import Placement
    from moetuner.problem import PlacementProblem

    Floats = NDArray[np.float64]

PROGRAMS_PER_CORE = 8
"""Programs that a core is given at a time: children start anew for each such lot."""


@dataclass(frozen=True, kw_only=True, slots=True)
class LnsConfig:
    """Options of `LnsSolver` alone.

    Parameters
    ----------
    program_seconds
        Time that a program may take on a core, about, the first time.
    max_visits
        Size of a program: places that experts, and tokens with the same experts, may
        have to visit. It decides how many ranks are freed at a time; two
        are always.
    """

    program_seconds: float = 3.0
    max_visits: int = 400

    def __post_init__(self) -> None:
        seconds, visits = self.program_seconds, self.max_visits
        if not is_number(seconds) or not seconds > 0:
            raise SolverError(
                f"LnsConfig: program_seconds must be > 0 s, got {seconds!r}"
            )
        if not is_whole(visits) or visits < 1:
            raise SolverError(
                f"LnsConfig: max_visits must be a whole number >= 1, got {visits!r}"
            )


@dataclass(frozen=True, kw_only=True, slots=True)
class LnsSolver:
    """Frees some ranks of a layer, solves them exactly, goes on; proves small models.

    Starts at ``warm_start``, else at the best quick placement.
    """

    config: LnsConfig = LnsConfig()
    name: str = "lns"
    objectives: tuple[Objective, ...] = (Objective.MODELLED_TIME,)

    def solve(
        self,
        problem: PlacementProblem,
        options: SolverOptions = SolverOptions(),
        *,
        warm_start: Placement | None = None,
        progress: ProgressCallback | None = None,
    ) -> Solution:
        """See `moetuner.solver.Solver`."""
        check_objective(self, problem)
        _check(problem, warm_start)
        clock = Clock(time_limit=options.time_limit)
        starts = [warm_start] if warm_start else quick_placements(problem)
        run = _Run(
            config=self.config,
            problem=problem,
            options=options,
            progress=progress,
            clock=clock,
            placement=min(starts, key=problem.objective_value),
        )
        status = run.search()
        bound = run.bound()
        stages: tuple[Stage, ...] = ()
        slots = problem.slots_per_rank * problem.topology.num_ranks
        if bound is not None and slots > problem.num_experts:
            # Replicas are in no program: the proof is about placements without.
            stages = (run.stage("lns, without replicas", bound, status),)
            status, bound = _at_most_heuristic(status), None
        return finish(
            self,
            problem,
            run.placement,
            clock,
            status=status,
            lower_bound=bound,
            stages=stages,
            warm_start=warm_start,
        )


def _at_most_heuristic(status: SolveStatus) -> SolveStatus:
    return SolveStatus.HEURISTIC if status is SolveStatus.OPTIMAL else status


def _check(problem: PlacementProblem, warm_start: Placement | None) -> None:
    """Refuse what is no sum over layers, or has no program."""

    def refuse(reason: str) -> None:
        raise SolverError(f"solver lns: {reason}")

    workload = problem.workload
    assert workload is not None
    if workload.cost.homes is Homes.FOLLOW:
        refuse("homes=follow couples the layers; use joint or exact")
    if workload.takes_slowest:
        refuse("the worst of several traces is no sum over layers; use joint")
    if not all(isinstance(trace, Trace) for trace in workload.traces):
        refuse("needs the experts of each token; a source only counted loads")
    if not problem.equal_slots and problem.memory_slack is not None:
        refuse("a memory row couples all layers; drop memory_slack")
    if warm_start is not None and warm_start.has_replicas:
        refuse("warm_start holds replicas, which no program knows; use joint")


@dataclass(kw_only=True)
class _Run:
    """One solve: the placement so far, and a search for every layer."""

    config: LnsConfig
    problem: PlacementProblem
    options: SolverOptions
    progress: ProgressCallback | None
    clock: Clock
    placement: Placement
    value: float = field(init=False)
    _layers: list[LayerSearch] = field(default_factory=list)

    def search(self) -> SolveStatus:
        """Lots of neighbourhoods until all are closed, or time is over."""
        self.value = self.problem.objective_value(self.placement)
        if self.problem.topology.num_ranks == 1:
            return SolveStatus.HEURISTIC
        rng = np.random.default_rng(self.options.seed)
        try:
            self._open_layers(rng)
            while waiting := [each for each in self._layers if not each.closed]:
                if self.clock.left <= 0:
                    return SolveStatus.TIME_LIMIT
                order = rng.permutation(len(waiting)).tolist()
                size = PROGRAMS_PER_CORE * self._cores()
                for first in range(0, len(order), size):
                    lot = [waiting[i] for i in order[first : first + size]]
                    status = self._solve_lot(lot)
                    if status is not None:
                        return status
        except KeyboardInterrupt:
            return SolveStatus.INTERRUPTED
        return SolveStatus.HEURISTIC

    def bound(self) -> float | None:
        """What the layers' proofs prove together, where each has one."""
        workload = self.problem.workload
        assert workload is not None
        if workload.cost.homes is not Homes.UNIFORM or not self._layers:
            return None
        bounds = [each.bound for each in self._layers if each.bound is not None]
        if len(bounds) < self.problem.num_layers:
            return None
        return min(float(sum(bounds)), self.value)

    def stage(self, name: str, bound: float, status: SolveStatus) -> Stage:
        """What was proven of less than the problem."""
        proven = self.value - bound <= 1e-6 * self.value
        return Stage(
            name=name,
            objective=self.problem.objective,
            value=self.value,
            lower_bound=bound,
            status=SolveStatus.OPTIMAL if proven else status,
            seconds=self.clock.seconds,
        )

    def _cores(self) -> int:
        return self.options.threads or os.cpu_count() or 1

    def _open_layers(self, rng: np.random.Generator) -> None:
        assert self.problem.workload is not None
        seconds = self.problem.workload.layer_seconds(self.placement)
        for layer, rank_of in enumerate(self.placement.rank_of()):
            self._layers.append(
                LayerSearch(
                    problem=self.problem,
                    layer=layer,
                    rank_of=rank_of,
                    seconds=float(seconds[layer]),
                    max_visits=self.config.max_visits,
                    rng=np.random.default_rng(rng.integers(2**63)),
                )
            )

    def _solve_lot(self, lot: list[LayerSearch]) -> SolveStatus | None:
        """A neighbourhood of each layer; a status when the search must end."""
        if self.clock.left <= 0:
            return SolveStatus.TIME_LIMIT
        models = [search.open_program().model for search in lot]
        cores = min(self._cores(), len(lot))
        effort = sum(search.effort for search in lot)
        results = solve_milps(
            models,
            time_limit=min(
                self.clock.left, self.config.program_seconds * effort / cores
            ),
            threads=cores,
            seed=self.options.seed,
        )
        for search, result in zip(lot, results, strict=True):
            self._take(search, result)
        self._report()
        if any(result.status is SolveStatus.INTERRUPTED for result in results):
            return SolveStatus.INTERRUPTED
        return None

    def _take(self, search: LayerSearch, result: MilpResult) -> None:
        """Keep what a program found, if the problem's objective says so too."""
        better, seconds = search.candidate(result), search.seconds
        if better is not None:
            rank_of = self.placement.rank_of()
            rank_of[search.layer] = better
            placement = place(self.problem, rank_of)
            value = self.problem.objective_value(placement)
            if value < self.value:
                seconds -= self.value - value
                self.placement, self.value = placement, value
            else:
                better = None
        search.close(result, better, seconds)

    def _report(self) -> None:
        if self.progress:
            self.progress(
                ProgressEvent(
                    solver="lns",
                    stage="lns",
                    done=sum(search.closed for search in self._layers),
                    total=len(self._layers),
                    incumbent=self.value,
                    bound=self.bound(),
                    seconds=self.clock.seconds,
                )
            )
