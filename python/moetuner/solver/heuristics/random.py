"""A random placement with equal sizes: the other end of the baselines."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

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
class RandomSolver:
    """Each layer's experts in an order drawn from the seed."""

    config: NoConfig = NO_CONFIG
    name: str = "random"
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
        shuffled = np.random.default_rng(options.seed).permuted(blocks, axis=1)
        return finish(
            self,
            problem,
            shuffled,
            clock,
            status=SolveStatus.HEURISTIC,
            warm_start=warm_start,
        )
