"""Neighbouring experts share a rank: what engines do without a placement."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from moetuner.placement.model import contiguous_rank_of
from moetuner.problem import Objective
from moetuner.solver.base import (
    NO_CONFIG,
    Clock,
    NoConfig,
    ProgressCallback,
    Solution,
    SolverOptions,
    SolveStatus,
    finish,
)

if TYPE_CHECKING:
    from moetuner.placement.model import Placement
    from moetuner.problem import PlacementProblem


@dataclass(frozen=True, kw_only=True, slots=True)
class ContiguousSolver:
    """Blocks of consecutive expert ids, the same in every layer."""

    config: NoConfig = NO_CONFIG
    name: str = "contiguous"
    objectives: tuple[Objective, ...] = tuple(Objective)

    def solve(
        self,
        problem: PlacementProblem,
        options: SolverOptions = SolverOptions(),
        *,
        warm_start: Placement | None = None,
        progress: ProgressCallback | None = None,  # noqa: ARG002
    ) -> Solution:
        """See `moetuner.solver.Solver`."""
        clock = Clock(time_limit=options.time_limit)
        blocks = contiguous_rank_of(
            problem.num_layers, problem.num_experts, problem.topology.num_ranks
        )
        return finish(
            self,
            problem,
            blocks,
            clock,
            status=SolveStatus.HEURISTIC,
            warm_start=warm_start,
        )
