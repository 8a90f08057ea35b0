"""Load balance alone: longest processing time first, then swaps.

Graham's rule with equal slots (the packing that EPLB uses without replicas), improved
by exchanging experts of the fullest rank while its load falls.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

import moetuner._core as _core
from moetuner.problem import Objective
from moetuner.solver.base import NO_CONFIG, Answer, Heuristic, NoConfig

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from moetuner.problem import PlacementProblem
    from moetuner.solver.base import Clock, SolverOptions


@dataclass(frozen=True, kw_only=True, slots=True)
class LptSolver(Heuristic):
    """Milliseconds, near-perfect balance, no thought of traffic."""

    config: NoConfig = NO_CONFIG
    name: str = "lpt"
    objectives: tuple[Objective, ...] = (Objective.MAX_LOAD, Objective.LOAD_DEVIATION)

    def answer(
        self,
        problem: PlacementProblem,
        options: SolverOptions,  # noqa: ARG002
        clock: Clock,  # noqa: ARG002
    ) -> Answer:
        """See `Heuristic`."""
        return Answer(
            found=balanced_rank_of(problem),
            lower_bound=float(load_bounds(problem).mean()),
        )


def balanced_rank_of(problem: PlacementProblem) -> NDArray[np.int32]:
    """LPT with swaps in every layer, int32 [L, E]."""
    num_ranks = problem.topology.num_ranks
    rows = []
    for load in problem.relative_load():
        packed = _core.pack_by_load(load, num_ranks, problem.slots_per_rank)
        fill_empty_ranks(packed, load, num_ranks)
        rows.append(_core.refine_by_swaps(load, packed, num_ranks))
    return np.stack(rows)


def load_bounds(problem: PlacementProblem) -> NDArray[np.float64]:
    """Proven lower bound of each layer's load objective, float64 [L].

    The fullest rank holds at least the mean load, and at least the heaviest expert h.
    If h exceeds the mean, the deviations are at least (h - mean) on that rank and as
    much in total below the mean elsewhere.
    """
    load = problem.relative_load()
    used = load.sum(axis=1) > 0
    heaviest = np.maximum(load.max(axis=1), 1.0)
    if problem.objective is Objective.MAX_LOAD:
        return np.where(used, heaviest, 0.0)
    return np.where(used, 2 * (heaviest - 1.0), 0.0)


def fill_empty_ranks(
    rank_of: NDArray[np.int32], load: NDArray[np.float64], num_ranks: int
) -> None:
    """Give a rank that LPT left empty the lightest expert of the fullest rank."""
    sizes = np.bincount(rank_of, minlength=num_ranks)
    for empty in np.flatnonzero(sizes == 0):
        fullest = int(sizes.argmax())
        experts = np.flatnonzero(rank_of == fullest)
        rank_of[experts[load[experts].argmin()]] = empty
        sizes[fullest] -= 1
        sizes[empty] += 1
