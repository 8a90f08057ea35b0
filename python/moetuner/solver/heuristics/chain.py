"""LPT clusters, then a chain of assignments that lines up neighbouring layers.

With one link speed only the relative order of neighbouring layers matters, so fixed
clusters are placed optimally by L - 1 independent assignments: linear for the total
traffic, bottleneck for the slowest link. With two link speeds each step is optimal
given the step before it, the chain as a whole is not.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from scipy.optimize import linear_sum_assignment
from scipy.sparse import csr_array
from scipy.sparse.csgraph import maximum_bipartite_matching

from moetuner.problem import Objective
from moetuner.solver.base import (
    NO_CONFIG,
    Answer,
    Heuristic,
    NoConfig,
    SolveStatus,
    Stage,
    place,
)
from moetuner.solver.heuristics.lpt import balanced_rank_of

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from moetuner.problem import PlacementProblem
    from moetuner.solver.base import Clock, SolverOptions

    Floats = NDArray[np.float64]


@dataclass(frozen=True, kw_only=True, slots=True)
class ChainSolver(Heuristic):
    """Balance first, then exact (one link speed) or stepwise alignment of layers."""

    config: NoConfig = NO_CONFIG
    name: str = "chain"
    objectives: tuple[Objective, ...] = (
        Objective.TOTAL_TRAFFIC,
        Objective.LINK_TRAFFIC,
    )

    def answer(
        self,
        problem: PlacementProblem,
        options: SolverOptions,  # noqa: ARG002
        clock: Clock,
    ) -> Answer:
        """See `Heuristic`."""
        problem.statistics.require_transitions("solver chain")
        clusters = balanced_rank_of(problem)
        rank_of, exact = align_layers(problem, clusters), alignment_is_exact(problem)
        value = problem.objective_value(place(problem, rank_of))
        stage = Stage(
            name="alignment of fixed clusters",
            objective=problem.objective,
            value=value,
            lower_bound=value if exact else None,
            status=SolveStatus.OPTIMAL if exact else SolveStatus.HEURISTIC,
            seconds=clock.seconds,
        )
        return Answer(found=rank_of, stages=(stage,))


def alignment_is_exact(problem: PlacementProblem) -> bool:
    """Whether `align_layers` is optimal for its clusters."""
    one_speed = problem.topology.num_nodes == 1 or problem.topology.ranks_per_node == 1
    one_speed = one_speed and problem.alike_links
    return one_speed or problem.objective is Objective.TOTAL_TRAFFIC


def align_layers(
    problem: PlacementProblem, clusters: NDArray[np.integer[Any]]
) -> NDArray[np.int32]:
    """Name the clusters [L, E] of each layer by ranks, the first layer as it is."""
    transitions = problem.statistics.require_transitions("align_layers")
    num_ranks = problem.topology.num_ranks
    link_seconds = problem.link_seconds()
    onehot = np.eye(num_ranks)
    rank_of = np.empty(clusters.shape, np.int32)
    rank_of[0] = clusters[0]
    for layer in range(1, len(clusters)):
        here, there = onehot[rank_of[layer - 1]], onehot[clusters[layer]]
        flow = here.T @ transitions[layer - 1] @ there  # [rank, next cluster]
        if problem.objective is Objective.TOTAL_TRAFFIC:
            new_rank = _least_total(flow)
        else:
            new_rank = _least_bottleneck(flow, link_seconds)
        rank_of[layer] = new_rank[clusters[layer]]
    return rank_of


def _least_total(flow: Floats) -> NDArray[np.int32]:
    """Rank of each cluster that keeps most flow on its rank."""
    ranks, clusters = linear_sum_assignment(flow, maximize=True)
    new_rank = np.empty(len(flow), np.int32)
    new_rank[clusters] = ranks
    return new_rank


def _least_bottleneck(flow: Floats, link_seconds: Floats) -> NDArray[np.int32]:
    """Rank of each cluster that makes the slowest link fastest; ties by total."""
    # slowest[g, c]: worst link into rank g when cluster c sits there.
    slowest = (flow[:, None, :] * link_seconds[:, :, None]).max(axis=0)
    total = np.einsum("hc,hg->gc", flow, link_seconds)
    forbidden = slowest > bottleneck(slowest)
    total[forbidden] = 1 + 2 * len(flow) * total.max()
    ranks, clusters = linear_sum_assignment(total)
    new_rank = np.empty(len(flow), np.int32)
    new_rank[clusters] = ranks
    return new_rank


def bottleneck(cost: Floats) -> float:
    """Least possible largest cost [G, G] of giving each row a column of its own."""
    levels = np.unique(cost)
    low, high = 0, levels.size - 1
    while low < high:  # smallest level that admits a perfect matching
        middle = (low + high) // 2
        allowed = csr_array(cost <= levels[middle])
        if (maximum_bipartite_matching(allowed) >= 0).all():
            high = middle
        else:
            low = middle + 1
    return float(levels[low])
