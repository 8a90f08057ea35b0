"""The paper's first integer program: experts into clusters of equal load.

MoETuner (arXiv 2502.06643v1), ILP1, with the missing row sum_c x = 1 added. Layers do
not touch each other, so each is a program of its own::

    x[e, g] = 1 when expert e is in cluster g;  d[g] >= | load of g - mean |
    min sum_g d[g]      s.t.  sum_g x[e, g] = 1,   1 <= sum_e x[e, g] <= slots

Loads are in units of the mean rank load. With free sizes the upper limit is dropped, as
the paper prints it; see `moetuner.solver.programs.free_sizes` for its memory row. For
`Objective.MAX_LOAD` the objective is the largest load instead.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from moetuner._checks import is_whole
from moetuner.errors import SolverError
from moetuner.placement.model import Placement
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
from moetuner.solver.heuristics.lpt import balanced_rank_of, load_bounds
from moetuner.solver.programs.cbc import MilpNews, MilpResult, solve_milps
from moetuner.solver.programs.free_sizes import (
    check_sizes,
    even_out_sizes,
    within_memory,
)
from moetuner.solver.programs.model import MilpBuilder, MilpModel

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from moetuner.problem import PlacementProblem


@dataclass(frozen=True, kw_only=True, slots=True)
class Ilp1Config:
    """Options of `Ilp1Solver` alone.

    Parameters
    ----------
    gap_absolute
        A layer counts as optimal when value - bound is below this, in mean rank
        loads. Loads are sums of many numbers: gaps far below this cannot be seen in
        any running time.
    free_sizes
        As the paper prints it: a rank holds at least one expert and at most all, and
        the placement has as many slots as its largest cluster. Serving engines need
        equal ones.
    memory_slack
        With free sizes: how many experts a rank may hold above or below its equal
        share, summed over all layers (the paper's row 13, with slack); None drops
        the row.

    Raises
    ------
    SolverError
        When the slack is no whole number >= 0, or given for equal sizes.
    """

    gap_absolute: float = 1e-3

    free_sizes: bool = False
    memory_slack: int | None = None

    def __post_init__(self) -> None:
        slack = self.memory_slack
        if slack is None:
            return
        if not is_whole(slack) or slack < 0:
            raise SolverError(
                f"Ilp1Config: memory_slack must be a whole number >= 0, got {slack!r}"
            )
        if not self.free_sizes:
            raise SolverError(
                "Ilp1Config: memory_slack is about clusters of free size; it needs "
                "free_sizes=True"
            )


@dataclass(frozen=True, kw_only=True, slots=True)
class Ilp1Solver:
    """ILP1 with CBC, started from LPT with swaps."""

    config: Ilp1Config = Ilp1Config()
    name: str = "ilp1"
    objectives: tuple[Objective, ...] = (
        Objective.LOAD_DEVIATION,
        Objective.MAX_LOAD,
    )

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
        clock = Clock(time_limit=options.time_limit)
        config, most = self.config, problem.slots_per_rank
        if config.free_sizes:
            most = problem.num_experts
            if warm_start is not None:
                check_sizes(warm_start.rank_sizes(), config.memory_slack)
        start = within_memory(problem, balanced_rank_of(problem), config.memory_slack)
        tracker = _Tracker(problem, start, clock, progress)
        # A layer where the start already meets a proven bound needs no program.
        open_layers = np.flatnonzero(
            tracker.values - tracker.bounds > config.gap_absolute
        )
        try:
            results = solve_milps(
                [layer_model(problem, i, start[i], most) for i in open_layers.tolist()],
                time_limit=clock.left,
                gap_absolute=config.gap_absolute,
                threads=options.threads,
                seed=options.seed,
                on_news=lambda news: tracker.update(int(open_layers[news.index]), news),
            )
        except KeyboardInterrupt:  # while the models were built
            results = [MilpResult(status=SolveStatus.INTERRUPTED)] * open_layers.size
        rank_of, bounds = start.copy(), tracker.bounds
        for layer, result in zip(open_layers.tolist(), results, strict=True):
            rank_of[layer] = _better_layer(problem, layer, start[layer], most, result)
            if result.bound is not None:
                bounds[layer] = max(bounds[layer], result.bound)
        if config.free_sizes:
            rank_of = even_out_sizes(rank_of, problem.topology.num_ranks)
        status = worst_status(result.status for result in results)
        alone = layer_values(problem, rank_of)
        rank_of = within_memory(problem, rank_of, config.memory_slack)
        values = layer_values(problem, rank_of)
        if values.mean() > tracker.values.mean():
            rank_of, values = start, tracker.values
        if status is SolveStatus.OPTIMAL and values.mean() > alone.mean():
            status = SolveStatus.HEURISTIC  # the memory row had its price
        bounds = np.minimum(bounds, values)
        stage = Stage(
            name=self.name,
            objective=problem.objective,
            value=float(values.mean()),
            lower_bound=float(bounds.mean()),
            status=status,
            seconds=clock.seconds,
        )
        return finish(
            self,
            replace(problem, slots_per_rank=most),
            self._place(problem, rank_of),
            clock,
            status=status,
            lower_bound=float(bounds.mean()),
            stages=(stage,),
            warm_start=warm_start,
        )

    def _place(
        self, problem: PlacementProblem, rank_of: NDArray[np.int32]
    ) -> Placement:
        """The placement of `rank_of` [L, E], as wide as its largest cluster may be."""
        if not self.config.free_sizes:
            return place(problem, rank_of)
        return Placement.from_rank_of(
            rank_of,
            layer_ids=problem.statistics.layer_ids,
            topology=problem.topology,
        )


def layer_model(
    problem: PlacementProblem,
    layer: int,
    start: NDArray[np.integer[Any]],
    most: int,
) -> MilpModel:
    """ILP1 of one layer, warm-started from `start` [E], up to `most` experts a rank."""
    load = problem.relative_load()[layer]
    num_experts, num_ranks = problem.num_experts, problem.topology.num_ranks
    builder = MilpBuilder()
    x = builder.add_columns(num_experts, num_ranks, upper=1.0, integer=True)
    order = np.argsort(-load, kind="stable")
    # Clusters are interchangeable: the i-th heaviest expert may open at most cluster i.
    for i, expert in enumerate(order[:num_ranks].tolist()):
        builder.fix(x[expert, i + 1 :], 0.0)
    for expert in range(num_experts):
        builder.add_row(x[expert], lower=1.0, upper=1.0)
    least = max(1, num_experts - most * (num_ranks - 1))
    for rank in range(num_ranks):
        builder.add_row(x[:, rank], lower=float(least), upper=float(most))
    mean = load.sum() / num_ranks
    if problem.objective is Objective.MAX_LOAD:
        z = builder.add_columns(1, objective=1.0, lower=mean)
        for rank in range(num_ranks):
            builder.add_row([*x[:, rank], z[0]], [*load, -1.0], upper=0.0)
    else:
        d = builder.add_columns(num_ranks, objective=1.0)
        for rank in range(num_ranks):
            columns = [*x[:, rank], d[rank]]
            builder.add_row(columns, [*load, -1.0], upper=mean)
            builder.add_row(columns, [*load, 1.0], lower=mean)
    return builder.build(_start_values(start, order, x, len(builder)))


def layer_values(
    problem: PlacementProblem, rank_of: NDArray[np.integer[Any]]
) -> NDArray[np.float64]:
    """Each layer's share of the objective, float64 [L]; their mean is the objective."""
    loads = problem.rank_loads(rank_of)
    if problem.objective is Objective.MAX_LOAD:
        return np.asarray(loads.max(axis=1))
    deviation = np.abs(loads - loads.mean(axis=1, keepdims=True))
    return np.asarray(deviation.sum(axis=1))


def _start_values(
    start: NDArray[np.integer[Any]],
    order: NDArray[np.int64],
    x: NDArray[np.int64],
    num_columns: int,
) -> NDArray[np.float64]:
    """`start` with clusters named in the order in which `order` opens them."""
    opened = list(dict.fromkeys(start[order].tolist()))
    name = {rank: i for i, rank in enumerate(opened)}
    values = np.zeros(num_columns)
    for expert in range(len(x)):
        values[x[expert, name[int(start[expert])]]] = 1.0
    return values


def _better_layer(
    problem: PlacementProblem,
    layer: int,
    start: NDArray[np.int32],
    most: int,
    result: MilpResult,
) -> NDArray[np.int32]:
    """CBC's clusters when they are legal and better than the start's."""
    if result.x is None:
        return start
    num_experts, num_ranks = problem.num_experts, problem.topology.num_ranks
    x = result.x[: num_experts * num_ranks].reshape(num_experts, num_ranks)
    found = x.argmax(axis=1).astype(np.int32)
    sizes = np.bincount(found, minlength=num_ranks)
    if sizes.min() < 1 or sizes.max() > most:
        return start
    rows = np.stack([found, start])
    load = problem.relative_load()[layer]
    loads = np.stack([np.bincount(r, weights=load, minlength=num_ranks) for r in rows])
    if problem.objective is Objective.MAX_LOAD:
        new, old = loads.max(axis=1)
    else:
        new, old = np.abs(loads - load.sum() / num_ranks).sum(axis=1)
    return found if new < old else start


class _Tracker:
    """Incumbent and bound of every layer, and the progress events about their mean."""

    def __init__(
        self,
        problem: PlacementProblem,
        start: NDArray[np.int32],
        clock: Clock,
        progress: ProgressCallback | None,
    ) -> None:
        self.values = layer_values(problem, start)
        self.bounds = load_bounds(problem)
        self._best = self.values.copy()
        self._best_bounds = self.bounds.copy()
        self._clock = clock
        self._progress = progress
        self._done: set[int] = set()

    def update(self, layer: int, news: MilpNews) -> None:
        if news.ended:
            self._done.add(layer)
        if news.incumbent is not None:
            self._best[layer] = min(self._best[layer], news.incumbent)
        if news.bound is not None:
            self._best_bounds[layer] = max(self._best_bounds[layer], news.bound)
        if self._progress:
            self._progress(
                ProgressEvent(
                    solver="ilp1",
                    stage="ilp1",
                    done=len(self._done),
                    total=len(self._best),
                    incumbent=float(self._best.mean()),
                    bound=float(np.minimum(self._best_bounds, self._best).mean()),
                    seconds=self._clock.seconds,
                )
            )
