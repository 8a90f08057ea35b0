"""All layers in one integer program: least layer-to-layer traffic of small models.

x[l, e, g] = 1 when expert e of layer l sits on rank g; s[l, i, j, g] is the product of
x[l, i, g] and x[l + 1, j, g], so that s keeps T[l, i, j] rows on their rank::

    max sum T s      s <= x[l, i, g],  s <= x[l + 1, j, g]
    sum_j s[l, i, j, g] = S x[l, i, g],   sum_i s[l, i, j, g] = S x[l + 1, j, g]

The last two rows (products of the size rows with x) make the relaxation tight; without
equal and full ranks they are left out. What a pair of layers can keep at most, by the
semidefinite bound of `moetuner.bounds`, is a row too. Ranks are interchangeable: the
i-th expert of layer 0 opens at most rank i. Expect proofs up to about 8 layers of 8
experts, and a gap beyond.

Legend: L layers, E experts, G ranks, S slots per rank.
"""

from __future__ import annotations

import enum
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from moetuner.bounds.gram import Groups, KeptWeight
from moetuner.errors import SolverError
from moetuner.problem import Objective
from moetuner.solver.base import (
    Clock,
    ProgressCallback,
    ProgressEvent,
    Solution,
    SolverOptions,
    SolveStatus,
    check_objective,
    finish,
)
from moetuner.solver.heuristics.affinity import AffinitySolver
from moetuner.solver.programs.cbc import MilpResult, solve_milps
from moetuner.solver.programs.highs import solve_milp
from moetuner.solver.programs.model import MilpBuilder, MilpModel

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from moetuner.placement.model import Placement
    from moetuner.problem import PlacementProblem

    Floats = NDArray[np.float64]

MAX_PRODUCTS = 200_000
"""Products above which no program is built: its root would not be solved."""
_BOUND_STEPS = 150


class Backend(str, enum.Enum):
    """Who solves the program."""

    CBC = "cbc"
    HIGHS = "highs"


@dataclass(frozen=True, kw_only=True, slots=True)
class JointIlpConfig:
    """Options of `JointIlpSolver` alone.

    Parameters
    ----------
    backend
        CBC in a child process, with a warm start; or HiGHS, to check it.
    gap_absolute
        Stop when value - bound is below this share of the flow.
    """

    backend: Backend = Backend.CBC
    gap_absolute: float = 1e-6


@dataclass(frozen=True, kw_only=True, slots=True)
class JointIlpSolver:
    """Proves optima of small instances, and gaps of others."""

    config: JointIlpConfig = JointIlpConfig()
    name: str = "joint_ilp"
    objectives: tuple[Objective, ...] = (Objective.TOTAL_TRAFFIC,)

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
        flows = problem.statistics.require_transitions("solver joint_ilp").astype(float)
        _check(problem, flows)
        start = AffinitySolver().solve(problem, options, warm_start=warm_start)
        rank_of, bound = start.placement.rank_of(), 0.0
        total = float(flows.sum())
        if not total or start.value == 0:
            status, result = SolveStatus.OPTIMAL, None
        else:
            kept = kept_bounds(problem, flows, clock)
            bound = max(1 - float(kept.sum()) / total, 0.0)
            result = self._run(problem, flows, kept, rank_of, options, clock, progress)
            status = result.status
        if result is not None:
            rank_of = _read(problem, result, rank_of)
            if result.bound is not None:
                bound = max(bound, 1 + result.bound)
        return finish(
            self,
            problem,
            rank_of,
            clock,
            status=status,
            lower_bound=min(bound, 1.0),
            warm_start=start.placement,
        )

    def _run(
        self,
        problem: PlacementProblem,
        flows: Floats,
        kept: Floats,
        start: NDArray[np.int32],
        options: SolverOptions,
        clock: Clock,
        progress: ProgressCallback | None,
    ) -> MilpResult:
        def report(_: int, incumbent: float | None, low: float | None) -> None:
            if progress:
                progress(
                    ProgressEvent(
                        solver=self.name,
                        stage=self.name,
                        done=0 if incumbent is not None else 1,
                        total=1,
                        incumbent=None if incumbent is None else 1 + incumbent,
                        bound=None if low is None else 1 + low,
                        seconds=clock.seconds,
                    )
                )

        if clock.left <= 0:
            return MilpResult(status=SolveStatus.TIME_LIMIT)
        try:
            model = joint_model(problem, flows, kept, start)
            if self.config.backend is Backend.HIGHS:
                return solve_milp(model, time_limit=clock.left)
            (result,) = solve_milps(
                [model],
                time_limit=clock.left,
                gap_absolute=self.config.gap_absolute,
                threads=options.threads,
                seed=options.seed,
                on_update=report,
            )
        except KeyboardInterrupt:
            return MilpResult(status=SolveStatus.INTERRUPTED)
        return result


def kept_bounds(problem: PlacementProblem, flows: Floats, clock: Clock) -> Floats:
    """Rows that each pair of layers can keep on their rank at most, float64 [L - 1]."""
    kept: Floats = flows.sum(axis=(1, 2))
    if not problem.equal_slots:
        return kept
    slots, num_ranks = problem.slots_per_rank, problem.topology.num_ranks
    groups = Groups(num_groups=num_ranks, sizes=(slots, slots))
    block, num_experts = num_ranks * slots, problem.num_experts
    for layer, flow in enumerate(flows):
        if clock.seconds > 0.2 * clock.time_limit:
            break
        weight = np.zeros((2 * block, 2 * block))
        weight[:num_experts, block : block + num_experts] = flow / 2
        search = KeptWeight(weight=weight + weight.T, groups=groups)
        search.quick()
        kept[layer] = min(kept[layer], search.improve(max_iterations=_BOUND_STEPS))
    return kept


def joint_model(
    problem: PlacementProblem,
    flows: Floats,
    kept: Floats,
    start: NDArray[np.integer],
) -> MilpModel:
    """The program; its value is minus the share of the flow that stays."""
    num_layers, num_experts = problem.num_layers, problem.num_experts
    num_ranks, total = problem.topology.num_ranks, float(flows.sum())
    builder = MilpBuilder()
    x = builder.add_columns(num_layers, num_experts, num_ranks, upper=1.0, integer=True)
    for expert in range(min(num_experts, num_ranks)):
        builder.fix(x[0, expert, expert + 1 :], 0.0)
    equal = problem.equal_slots
    most = float(problem.slots_per_rank if equal else num_experts)
    full = equal and num_ranks * problem.slots_per_rank == num_experts
    for layer in range(num_layers):
        for expert in range(num_experts):
            builder.add_row(x[layer, expert], lower=1.0, upper=1.0)
        for rank in range(num_ranks):
            least = most if full else 0.0 if equal else 1.0
            builder.add_row(x[layer, :, rank], lower=least, upper=most)
    if not equal and problem.memory_slack is not None:  # the paper's row (13)
        share = num_layers * num_experts / num_ranks
        low, high = share - problem.memory_slack, share + problem.memory_slack
        for rank in range(num_ranks):
            builder.add_row(x[:, :, rank].ravel(), lower=low, upper=high)
    for layer, flow in enumerate(flows):
        s = builder.add_columns(num_experts, num_experts, num_ranks, upper=1.0)
        builder.add_row(
            s.ravel(),
            np.repeat(flow.ravel() / total, num_ranks),
            upper=float(kept[layer]) / total * (1 + 1e-9),
        )
        builder.weigh(s, -np.repeat(flow.ravel() / total, num_ranks))
        for side, along in ((x[layer], 1), (x[layer + 1], 0)):
            for expert in range(num_experts):
                for rank in range(num_ranks):
                    own = side[expert, rank]
                    products = s[expert, :, rank] if along else s[:, expert, rank]
                    for product in products.tolist():
                        builder.add_row([product, own], [1.0, -1.0], upper=0.0)
                    if full:
                        builder.add_row(
                            [*products, own],
                            [*np.ones(num_experts), -most],
                            lower=0.0,
                            upper=0.0,
                        )
    return builder.build(_start_values(start, x, len(builder)))


def _start_values(
    start: NDArray[np.integer], x: NDArray[np.int64], num_columns: int
) -> Floats:
    """`start` [L, E] with ranks named in the order in which layer 0 opens them."""
    num_ranks = x.shape[2]
    opened = list(dict.fromkeys(start[0].tolist()))
    opened += [rank for rank in range(num_ranks) if rank not in opened]
    name = np.empty(num_ranks, np.int64)
    name[opened] = np.arange(num_ranks)
    layers, experts = np.indices(start.shape)
    values = np.zeros(num_columns)
    values[x[layers, experts, name[start]]] = 1.0
    return values


def _read(
    problem: PlacementProblem, result: MilpResult, start: NDArray[np.int32]
) -> NDArray[np.int32]:
    """The program's placement when it is legal, else the start."""
    if result.x is None:
        return start
    shape = (*start.shape, problem.topology.num_ranks)
    found = result.x[: int(np.prod(shape))].reshape(shape).argmax(axis=2)
    found = found.astype(np.int32)
    sizes = problem.rank_sizes(found)
    if problem.equal_slots:
        legal = sizes.max() <= problem.slots_per_rank
    else:
        legal = sizes.min() >= 1 and problem.keeps_memory(found)
    return found if legal else start


def _check(problem: PlacementProblem, flows: Floats) -> None:
    products = flows.size * problem.topology.num_ranks
    if products > MAX_PRODUCTS:
        raise SolverError(
            f"solver joint_ilp: {products} products of placements, at most "
            f"{MAX_PRODUCTS}; use a solver that searches"
        )
