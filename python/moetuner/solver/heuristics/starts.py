"""Where searches begin: what the quick methods find."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from moetuner.placement.model import contiguous_rank_of
from moetuner.problem import Objective
from moetuner.solver.base import place
from moetuner.solver.heuristics.chain import align_layers
from moetuner.solver.heuristics.lpt import balanced_rank_of

if TYPE_CHECKING:
    from collections.abc import Iterator

    import numpy as np
    from numpy.typing import NDArray

    from moetuner.placement.model import Placement
    from moetuner.problem import PlacementProblem

    RankOf = NDArray[np.int32]

FAST_STARTS = 2
"""The first ones take a moment."""


def quick_placements(problem: PlacementProblem) -> list[Placement]:
    """Placements of the quick methods."""
    return list(quick_starts(problem))


def quick_starts(problem: PlacementProblem) -> Iterator[Placement]:
    """The same, made one by one as they are asked for."""
    return (place(problem, rank_of) for rank_of in _starts(problem))


def start_ranks(problem: PlacementProblem) -> list[RankOf]:
    """Ranks [L, E] of the quick methods."""
    return list(_starts(problem))


def _starts(problem: PlacementProblem) -> Iterator[RankOf]:
    """What takes longest comes last."""
    topology = problem.topology
    balanced = balanced_rank_of(replace(problem, objective=Objective.MAX_LOAD))
    yield balanced
    yield contiguous_rank_of(
        problem.num_layers, problem.num_experts, topology.num_ranks
    )
    if problem.statistics.transitions is not None:
        asked = replace(problem, objective=Objective.LINK_TRAFFIC)
        yield align_layers(asked, balanced)
