"""A random placement with equal sizes: the other end of the baselines."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from moetuner.placement.model import contiguous_rank_of
from moetuner.problem import Objective
from moetuner.solver.base import NO_CONFIG, Answer, Heuristic, NoConfig

if TYPE_CHECKING:
    from moetuner.problem import PlacementProblem
    from moetuner.solver.base import Clock, SolverOptions


@dataclass(frozen=True, kw_only=True, slots=True)
class RandomSolver(Heuristic):
    """Each layer's experts in an order drawn from the seed."""

    config: NoConfig = NO_CONFIG
    name: str = "random"
    objectives: tuple[Objective, ...] = tuple(Objective)

    def answer(
        self,
        problem: PlacementProblem,
        options: SolverOptions,
        clock: Clock,  # noqa: ARG002
    ) -> Answer:
        """See `Heuristic`."""
        blocks = contiguous_rank_of(
            problem.num_layers, problem.num_experts, problem.topology.num_ranks
        )
        shuffled = np.random.default_rng(options.seed).permuted(blocks, axis=1)
        return Answer(found=shuffled)
