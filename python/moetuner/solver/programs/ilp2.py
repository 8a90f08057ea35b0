"""The paper's two stages: ILP1 makes clusters, ILP2 gives clusters to GPUs.

MoETuner (arXiv 2502.06643v1), ILP2: with C[l, a, b] rows flowing from cluster a of
layer l to cluster b of layer l + 1, and one-to-one y[l, c, g]::

    min sum_l w_l,   w_l >= C[l, a, b] * seconds per row between the ranks of a and b

Where only three speeds exist (same rank: nothing, same node, other node), the products
of y are needed only as "a and b share a rank" and "a and b share a node"; each is
linearised with the tight form whose row sums equal y. With one speed ILP2 splits into
exact assignments (see `moetuner.solver.heuristics.chain`) and no program is built.
Where each pair of ranks has its own speed: `moetuner.solver.programs.pair_links`.
"""

from __future__ import annotations

import bisect
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np

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
from moetuner.solver.heuristics.chain import align_layers, alignment_is_exact
from moetuner.solver.programs.cbc import MilpNews, MilpResult, solve_milps
from moetuner.solver.programs.ilp1 import Ilp1Solver
from moetuner.solver.programs.model import MilpBuilder, MilpModel
from moetuner.solver.programs.pair_links import pair_link_bounds, pair_link_model

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from moetuner.placement.model import Placement
    from moetuner.problem import PlacementProblem

    Floats = NDArray[np.float64]

MAX_PRODUCTS = 200_000
"""Products of y above which no program is built: CBC would not solve its root."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Ilp2Config:
    """Options of `Ilp2Solver` alone.

    Parameters
    ----------
    force_ilp
        Build the program even where assignments are exact (to compare the two).
    gap_relative
        Stop ILP2 when (value - bound) / value of the chain is below this; the paper
        used 0.025.
    """

    force_ilp: bool = False
    gap_relative: float = 1e-4


@dataclass(frozen=True, kw_only=True, slots=True)
class Ilp2Solver:
    """The paper's method: ILP1, then ILP2, half of the time each."""

    config: Ilp2Config = Ilp2Config()
    name: str = "ilp2"
    objectives: tuple[Objective, ...] = (Objective.LINK_TRAFFIC,)

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
        problem.statistics.require_transitions("solver ilp2")
        clock = Clock(time_limit=options.time_limit)
        first = Ilp1Solver().solve(
            replace(problem, objective=Objective.LOAD_DEVIATION),
            replace(options, time_limit=options.time_limit / 2),
            progress=progress,
        )
        clusters = first.placement.rank_of()
        if first.status is SolveStatus.INTERRUPTED:
            clock.time_limit = 0.0  # one Ctrl-C ends both stages
        rank_of, stage = self._give_ranks(problem, clusters, options, clock, progress)
        interrupted = SolveStatus.INTERRUPTED in (first.status, stage.status)
        return finish(
            self,
            problem,
            rank_of,
            clock,
            status=SolveStatus.INTERRUPTED if interrupted else SolveStatus.HEURISTIC,
            stages=(*first.stages, stage),
            warm_start=warm_start,
        )

    def _give_ranks(
        self,
        problem: PlacementProblem,
        clusters: NDArray[np.int32],
        options: SolverOptions,
        clock: Clock,
        progress: ProgressCallback | None,
    ) -> tuple[NDArray[np.int32], Stage]:
        """Ranks of fixed clusters, and how well that is known to be done."""
        began = clock.seconds
        start, exact = align_layers(problem, clusters), alignment_is_exact(problem)
        value = scale = problem.objective_value(place(problem, start))
        bound, status = value, SolveStatus.OPTIMAL
        if (self.config.force_ilp or not exact) and value > 0:
            flows = problem.rank_flows(start)
            bounds = pair_bounds(problem, flows)
            result = self._map(problem, start, bounds, options, clock, progress)
            best = start if result.x is None else _read_ranks(problem, result.x, start)
            best_value = problem.objective_value(place(problem, best))
            if best_value < value:
                start, value = best, best_value
            known = float(bounds.sum())
            if result.bound is not None:
                known = max(known, result.bound * scale)
            bound, status = min(known, value), result.status
        return start, Stage(
            name="ilp2 on these clusters",
            objective=problem.objective,
            value=value,
            lower_bound=bound,
            status=status,
            seconds=clock.seconds - began,
        )

    def _map(
        self,
        problem: PlacementProblem,
        start: NDArray[np.int32],
        bounds: Floats,
        options: SolverOptions,
        clock: Clock,
        progress: ProgressCallback | None,
    ) -> MilpResult:
        """What CBC makes of ILP2; 1 is the objective of `start`."""
        flows = problem.rank_flows(start)
        scale = problem.objective_value(place(problem, start))
        if clock.left <= 0 or flows.size * problem.topology.num_ranks > MAX_PRODUCTS:
            return MilpResult(status=SolveStatus.TIME_LIMIT)

        def report(news: MilpNews) -> None:
            low = news.bound
            if progress:
                progress(
                    ProgressEvent(
                        solver=self.name,
                        stage="ilp2",
                        done=int(news.ended),
                        total=1,
                        incumbent=min(news.incumbent or 1.0, 1.0) * scale,
                        bound=None if low is None else low * scale,
                        seconds=clock.seconds,
                    )
                )

        try:
            model = (
                mapping_model(problem, flows, bounds, scale)
                if problem.alike_links
                else pair_link_model(flows, problem.link_seconds(), bounds, scale)
            )
            (result,) = solve_milps(
                [model],
                time_limit=clock.left,
                gap_absolute=self.config.gap_relative,
                seed=options.seed,
                threads=options.threads,
                on_news=report,
            )
        except KeyboardInterrupt:  # while the model was built
            return MilpResult(status=SolveStatus.INTERRUPTED)
        return result


def pair_bounds(problem: PlacementProblem, flows: Floats) -> Floats:
    """Least possible slowest link of each layer pair by itself, float64 [L - 1].

    For a threshold, pairs too slow between nodes must share a node (at most m partners
    each) and pairs too slow inside a node must share a rank (a matching). The smallest
    threshold that passes both necessary tests bounds every placement. Where pairs
    have speeds of their own: `pair_link_bounds`.
    """
    topology = problem.topology
    seconds = problem.link_seconds()
    if not problem.alike_links:
        return pair_link_bounds(flows, seconds)
    inside = seconds[topology.same_node()].max()
    outside = seconds.max() if topology.num_nodes > 1 else inside
    most = topology.ranks_per_node

    def fits(flow: Floats, level: float) -> bool:
        slow = ((flow * inside > level, 1), (flow * outside > level, most))
        return all(pairs.sum(axis).max() <= n for pairs, n in slow for axis in (0, 1))

    bounds = np.zeros(len(flows))
    for layer, flow in enumerate(flows):
        levels = np.unique(np.concatenate([flow * inside, flow * outside], None))
        bounds[layer] = levels[
            bisect.bisect_left(levels, True, key=lambda level: fits(flow, level))
        ]
    return bounds


def mapping_model(
    problem: PlacementProblem,
    flows: Floats,
    bounds: Floats,
    scale: float,
) -> MilpModel:
    """ILP2 for clusters that sit, at the start, on the rank of their own number.

    ``flows`` [L - 1, G, G] are between clusters; 1 in the objective is ``scale``
    seconds.
    """
    topology = problem.topology
    num_ranks, num_nodes = topology.num_ranks, topology.num_nodes
    num_layers = len(flows) + 1
    seconds = problem.link_seconds() / scale
    inside = seconds[topology.same_node()].max()
    outside = seconds.max() if num_nodes > 1 else inside
    builder = MilpBuilder()
    y = builder.add_columns(num_layers, num_ranks, num_ranks, upper=1.0, integer=True)
    _break_symmetry(builder, y, num_nodes)
    for layer in range(num_layers):
        for i in range(num_ranks):
            builder.add_row(y[layer, i], lower=1.0, upper=1.0)
            builder.add_row(y[layer, :, i], lower=1.0, upper=1.0)
    # Z[l, c, n]: cluster c of layer l is on node n.
    by_node = y.reshape(num_layers, num_ranks, num_nodes, topology.ranks_per_node)
    for layer, flow in enumerate(flows):
        w = builder.add_columns(
            1, objective=1.0, lower=bounds[layer] / scale * (1 - 1e-9)
        )
        share_rank = _add_sharing(builder, y[layer][..., None], y[layer + 1][..., None])
        share_node = (
            _add_sharing(builder, by_node[layer], by_node[layer + 1])
            if num_nodes > 1
            else None
        )
        for a in range(num_ranks):
            for b in range(num_ranks):
                if flow[a, b] * outside <= bounds[layer] / scale:
                    continue  # cannot exceed the bound wherever it goes
                columns = [w[0], *share_rank[a, b]]
                factors = [1.0] + [flow[a, b] * inside] * num_ranks
                if share_node is not None:
                    columns += [*share_node[a, b]]
                    factors += [flow[a, b] * (outside - inside)] * num_nodes
                builder.add_row(columns, factors, lower=flow[a, b] * outside)
    values = np.zeros(len(builder))
    values[y[:, np.arange(num_ranks), np.arange(num_ranks)]] = 1.0
    return builder.build(values)


def _break_symmetry(builder: MilpBuilder, y: NDArray[np.int64], num_nodes: int) -> None:
    """Fix what renaming ranks inside nodes, and nodes, can undo.

    With one node, or one rank per node, that is the whole first layer; else cluster 0
    goes to rank 0.
    """
    num_ranks = y.shape[1]
    if num_nodes in (1, num_ranks):
        for cluster in range(num_ranks):
            builder.fix(np.delete(y[0, cluster], cluster), 0.0)
    else:
        builder.fix(y[0, 0, 1:], 0.0)


def _add_sharing(
    builder: MilpBuilder, here: NDArray[np.int64], there: NDArray[np.int64]
) -> NDArray[np.int64]:
    """Columns s[a, b, i]: a and b are both in place i (a rank, or a node).

    ``here`` and ``there`` [G, places, ranks of the place] are columns of y; sums over
    the last axis say whether a cluster is in the place. Row sums tie s to them:
    sum_b s[a, b, i] = size * here[a, i].
    """
    num_ranks, num_places, size = here.shape
    s = builder.add_columns(num_ranks, num_ranks, num_places, upper=1.0)
    for place_index in range(num_places):
        for i in range(num_ranks):
            for total, members in (
                (here[i, place_index], s[i, :, place_index]),
                (there[i, place_index], s[:, i, place_index]),
            ):
                builder.add_row(
                    np.concatenate([members, total]),
                    np.concatenate([np.ones(num_ranks), np.full(size, -float(size))]),
                    lower=0.0,
                    upper=0.0,
                )
            # With one rank per place the row sums above already say s <= here, there.
            for j in range(num_ranks if size > 1 else 0):
                for side in (here[i, place_index], there[j, place_index]):
                    builder.add_row(
                        np.concatenate([[s[i, j, place_index]], side]),
                        np.concatenate([[1.0], np.full(size, -1.0)]),
                        upper=0.0,
                    )
    return s


def _read_ranks(
    problem: PlacementProblem, x: Floats, start: NDArray[np.int32]
) -> NDArray[np.int32]:
    """Ranks of the experts by the program's y; the start when y is no bijection."""
    num_ranks, num_layers = problem.topology.num_ranks, problem.num_layers
    y = x[: num_layers * num_ranks**2].reshape(num_layers, num_ranks, num_ranks)
    new_rank = y.argmax(axis=2)
    if (np.sort(new_rank, axis=1) != np.arange(num_ranks)).any():
        return start
    return np.take_along_axis(new_rank, start.astype(np.int64), axis=1).astype(np.int32)
