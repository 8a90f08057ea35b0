"""Neighbouring experts share a rank: what engines do without a placement."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from moetuner.placement.model import contiguous_rank_of
from moetuner.problem import Objective
from moetuner.solver.base import NO_CONFIG, Answer, Heuristic, NoConfig

if TYPE_CHECKING:
    from moetuner.problem import PlacementProblem
    from moetuner.solver.base import Clock, SolverOptions


@dataclass(frozen=True, kw_only=True, slots=True)
class ContiguousSolver(Heuristic):
    """Blocks of consecutive expert ids, the same in every layer."""

    config: NoConfig = NO_CONFIG
    name: str = "contiguous"
    objectives: tuple[Objective, ...] = tuple(Objective)

    def answer(
        self,
        problem: PlacementProblem,
        options: SolverOptions,  # noqa: ARG002
        clock: Clock,  # noqa: ARG002
    ) -> Answer:
        """See `Heuristic`."""
        blocks = contiguous_rank_of(
            problem.num_layers, problem.num_experts, problem.topology.num_ranks
        )
        return Answer(found=blocks)
