"""The modelled time itself as integer programs: proven optima of small layers.

Where homes do not follow, a batch's time is a sum over layers, and each layer is a
program of its own (`moetuner.solver.programs.layer`). CBC solves them side by side.
What it does not finish keeps the better of its start and what was found, the larger of
CBC's bound and the counting bound, and a status that says so.

Legend: L layers, E experts.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np

from moetuner._checks import is_whole
from moetuner.bounds import layer_counting_bounds
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
    worst_status,
)
from moetuner.solver.heuristics.starts import quick_placements
from moetuner.solver.programs.cbc import MilpNews, MilpResult, solve_milps
from moetuner.solver.programs.layer import (
    MAX_EXPERTS,
    LayerProgram,
    count_visits,
    layer_program,
)
from moetuner.solver.programs.layer_tokens import LayerTokens
from moetuner.trace import Trace

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from moetuner.placement.model import Placement
    from moetuner.problem import PlacementProblem

    Floats = NDArray[np.float64]
    RankOf = NDArray[np.int32]


@dataclass(frozen=True, kw_only=True, slots=True)
class IlpConfig:
    """Options of `IlpSolver` alone.

    Parameters
    ----------
    max_visits
        Size of the largest program that is built, in choices of ranks and visits of
        sets of experts, see `moetuner.solver.programs.layer.count_visits`. 12 experts
        on 4 ranks, two chosen by a token, are about 300; 16 on 8 about 1,100.

    Raises
    ------
    SolverError
        When it is no whole number >= 1.
    """

    max_visits: int = 1_200

    def __post_init__(self) -> None:
        if not is_whole(self.max_visits) or self.max_visits < 1:
            raise SolverError(
                f"IlpConfig: max_visits must be a whole number >= 1, got "
                f"{self.max_visits!r}"
            )


@dataclass(frozen=True, kw_only=True, slots=True)
class IlpSolver:
    """One program for each layer, with CBC; a stage says how far each one got.

    Starts at ``warm_start``, else at the best quick placement.
    """

    config: IlpConfig = IlpConfig()
    name: str = "ilp"
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
            problem=problem,
            options=options,
            progress=progress,
            clock=clock,
            start=min(starts, key=problem.objective_value),
        )
        results = run.solve(self.config.max_visits)
        placement = run.best(results)
        stages = run.stages(placement, results)
        status = worst_status([stage.status for stage in stages])
        bound: float | None = sum(stage.lower_bound or 0.0 for stage in stages)
        if problem.spare_slots:
            # Replicas are in no program: the proof is about placements without.
            bound = None
            if status is SolveStatus.OPTIMAL:
                status = SolveStatus.HEURISTIC
        return finish(
            self,
            problem,
            placement,
            clock,
            status=status,
            lower_bound=bound,
            stages=stages,
            warm_start=warm_start,
        )


def _check(problem: PlacementProblem, warm_start: Placement | None) -> None:
    """Refuse what is no sum over layers, or has no program."""

    def refuse(reason: str) -> None:
        raise SolverError(f"solver ilp: {reason}")

    workload = problem.workload
    if workload.cost.homes is Homes.FOLLOW:
        refuse("homes=follow couples the layers; use joint or exact")
    if workload.takes_slowest:
        refuse("the worst of several traces is no sum over layers; use joint")
    if not all(isinstance(trace, Trace) for trace in workload.traces):
        refuse("needs the experts of each token; a source only counted loads")
    if problem.num_experts > MAX_EXPERTS:
        refuse(f"at most {MAX_EXPERTS} experts, got {problem.num_experts}; use joint")
    if warm_start is not None and warm_start.has_replicas:
        refuse("warm_start holds replicas, which no program knows; use joint")


@dataclass(kw_only=True)
class _Run:
    """One solve; results are by layer, None where there was no program."""

    problem: PlacementProblem
    options: SolverOptions
    progress: ProgressCallback | None
    clock: Clock
    start: Placement
    start_seconds: Floats = field(init=False)
    """Of each layer at the start, [L]."""
    bounds: Floats = field(init=False)
    """What is proven of each layer, [L]."""
    programs: dict[int, LayerProgram] = field(default_factory=dict)
    _incumbents: Floats = field(init=False)
    _done: set[int] = field(default_factory=set)

    def __post_init__(self) -> None:
        self.start_seconds = self.problem.workload.layer_seconds(self.start)
        self.bounds = layer_counting_bounds(self.problem)
        self._incumbents = self.start_seconds.copy()

    def solve(self, max_visits: int) -> dict[int, MilpResult]:
        """Build and solve programs, side by side, while there is time."""
        every_layer = range(self.problem.num_layers)
        try:
            too_large = self._build(max_visits)
            layers = list(self.programs)
            found = solve_milps(
                [program.model for program in self.programs.values()],
                time_limit=self.clock.left,
                threads=self.options.threads,
                seed=self.options.seed,
                on_news=lambda news: self._hear(layers[news.index], news),
            )
        except KeyboardInterrupt:  # while the programs were built
            interrupted = MilpResult(status=SolveStatus.INTERRUPTED)
            return dict.fromkeys(every_layer, interrupted)
        results = dict(zip(layers, found, strict=True))
        for layer, result in results.items():
            self._raise_bound(layer, result.bound)
        late = MilpResult(status=SolveStatus.TIME_LIMIT)
        return {i: results.get(i, late) for i in every_layer if i not in too_large}

    def _build(self, max_visits: int) -> set[int]:
        """Programs of all layers while there is time; those that are too large."""
        too_large = set()
        for layer, rank_of in enumerate(self.start.rank_of()):
            if self.clock.left <= 0:
                break
            tokens = LayerTokens.of(self.problem, layer)
            if count_visits(self.problem, tokens) > max_visits:
                too_large.add(layer)
                continue
            seconds = float(self.start_seconds[layer])
            self.programs[layer] = layer_program(self.problem, tokens, rank_of, seconds)
        return too_large

    def _raise_bound(self, layer: int, value: float | None) -> None:
        """Take a proven value of a layer's program, where it proves more."""
        if value is not None:
            bound = self.programs[layer].bound(value)
            self.bounds[layer] = max(self.bounds[layer], bound)

    def _hear(self, layer: int, news: MilpNews) -> None:
        """News of a layer's program."""
        self._raise_bound(layer, news.bound)
        if news.ended:
            self._done.add(layer)
        if news.incumbent is not None:
            seconds = self.programs[layer].seconds(news.incumbent)
            self._incumbents[layer] = min(self._incumbents[layer], seconds)
        if self.progress:
            self.progress(
                ProgressEvent(
                    solver="ilp",
                    stage="ilp",
                    done=len(self._done),
                    total=len(self.programs),
                    incumbent=float(self._incumbents.sum()),
                    bound=float(np.minimum(self.bounds, self._incumbents).sum()),
                    seconds=self.clock.seconds,
                )
            )

    def best(self, results: dict[int, MilpResult]) -> Placement:
        """The start with the layers that a program, and the evaluator, found better."""
        rank_of = self.start.rank_of()
        for layer, result in results.items():
            found = None if result.x is None else self.programs[layer].read(result.x)
            if found is not None:
                rank_of[layer] = found
        seconds = self.problem.workload.layer_seconds(place(self.problem, rank_of))
        better = seconds < self.start_seconds
        return place(
            self.problem, np.where(better[:, None], rank_of, self.start.rank_of())
        )

    def stages(
        self, placement: Placement, results: dict[int, MilpResult]
    ) -> tuple[Stage, ...]:
        """What is known of each layer."""
        seconds = self.problem.workload.layer_seconds(placement)
        stages = []
        for layer, value in enumerate(seconds.tolist()):
            result = results.get(layer, MilpResult(status=SolveStatus.HEURISTIC))
            number = int(self.problem.statistics.layer_ids[layer])
            built = "" if layer in results else ": no program, too large"
            stages.append(
                Stage(
                    name=f"layer {number}{built}",
                    objective=self.problem.objective,
                    value=value,
                    lower_bound=min(float(self.bounds[layer]), value),
                    status=result.status,
                    seconds=result.seconds,
                )
            )
        return tuple(stages)
