"""A random placement with equal sizes: the other end of the baselines."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from moetuner.placement.model import contiguous_rank_of
from moetuner.problem import Objective
from moetuner.solver.base import (
    Clock,
    ProgressCallback,
    Solution,
    SolverOptions,
    SolveStatus,
    finish,
)
from moetuner.solver.heuristics.lpt import within_memory

if TYPE_CHECKING:
    from moetuner.placement.model import Placement
    from moetuner.problem import PlacementProblem


class RandomSolver:
    """Each layer's experts in an order drawn from the seed."""

    name = "random"
    objectives = tuple(Objective)

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
        shuffled = np.random.default_rng(options.seed).permuted(blocks, axis=1)
        rank_of = within_memory(problem, shuffled)
        return finish(
            self,
            problem,
            rank_of,
            clock,
            status=SolveStatus.HEURISTIC,
            warm_start=warm_start,
        )
