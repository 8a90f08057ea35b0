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
    import numpy as np
    from numpy.typing import NDArray

    from moetuner.placement.model import Placement
    from moetuner.problem import PlacementProblem

    RankOf = NDArray[np.int32]


def quick_placements(problem: PlacementProblem) -> list[Placement]:
    """Placements of the quick methods."""
    return [place(problem, rank_of) for rank_of in start_ranks(problem)]


def start_ranks(problem: PlacementProblem) -> list[RankOf]:
    """Ranks [L, E] of the quick methods."""
    topology = problem.topology
    balanced = balanced_rank_of(replace(problem, objective=Objective.MAX_LOAD))
    blocks = contiguous_rank_of(
        problem.num_layers, problem.num_experts, topology.num_ranks
    )
    starts = [balanced, blocks]
    if problem.statistics.transitions is not None:
        asked = replace(problem, objective=Objective.LINK_TRAFFIC)
        starts.append(align_layers(asked, balanced))
    return starts
