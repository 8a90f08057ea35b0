"""Same-layer co-activation alone: experts that tokens choose together share a rank.

A baseline: it makes few remote ranks and looks neither at load nor at other layers.
Clusters grow greedily around the busiest expert left, then experts are swapped while
that keeps more pairs together; nodes come first, ranks inside each node second.

Legend: L layers, E experts, P clusters.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import compress
from typing import TYPE_CHECKING

import numpy as np

from moetuner.placement.model import contiguous_rank_of
from moetuner.problem import Objective
from moetuner.solver.base import NO_CONFIG, Answer, Heuristic, NoConfig
from moetuner.trace import Trace
from moetuner.trace.statistics import RoutingStatistics

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from moetuner.problem import PlacementProblem
    from moetuner.solver.base import Clock, SolverOptions

    Floats = NDArray[np.float64]


@dataclass(frozen=True, kw_only=True, slots=True)
class CoactivationSolver(Heuristic):
    """Keeps a token's experts together; hot experts may crowd together."""

    config: NoConfig = NO_CONFIG
    name: str = "coactivation"
    objectives: tuple[Objective, ...] = tuple(Objective)

    def answer(
        self,
        problem: PlacementProblem,
        options: SolverOptions,  # noqa: ARG002
        clock: Clock,
    ) -> Answer:
        """See `Heuristic`."""
        topology = problem.topology
        blocks = contiguous_rank_of(1, problem.num_experts, topology.num_ranks)[0]
        sizes = np.bincount(blocks, minlength=topology.num_ranks)
        rank_of = np.tile(blocks, (problem.num_layers, 1))
        for row, pairs in zip(rank_of, coactivation_of(problem), strict=True):
            row[:] = _two_levels(pairs, sizes, topology.ranks_per_node, clock)
        return Answer(found=rank_of)


def coactivation_of(problem: PlacementProblem) -> Floats:
    """Tokens that chose both experts, float64 [L, E, E], counted where it is missing.

    Raises
    ------
    MissingStatisticsError
        When the source only counted loads.
    """
    counted = problem.statistics.coactivation
    if counted is None:
        workload = problem.workload
        known = [isinstance(trace, Trace) for trace in workload.traces]
        if any(known):
            parts = [
                RoutingStatistics.from_trace(trace, transitions=False)
                for trace in compress(workload.traces, known)
            ]
            weights = tuple(compress(workload.weights, known))
            counted = RoutingStatistics.sum(parts, weights).coactivation
    if counted is None:
        counted = problem.statistics.require_coactivation("solver coactivation")
    return counted.astype(np.float64)


def _two_levels(
    pairs: Floats, sizes: NDArray[np.int64], ranks_per_node: int, clock: Clock
) -> NDArray[np.int32]:
    """Rank of each expert [E]: nodes first, then ranks inside each."""
    by_node = sizes.reshape(-1, ranks_per_node)
    node_of = cluster(pairs, by_node.sum(axis=1), clock)
    rank_of = np.empty(len(pairs), np.int32)
    for node, inside in enumerate(by_node):
        experts = np.flatnonzero(node_of == node)
        local = cluster(pairs[np.ix_(experts, experts)], inside, clock)
        rank_of[experts] = node * ranks_per_node + local
    return rank_of


def cluster(pairs: Floats, sizes: NDArray[np.int64], clock: Clock) -> NDArray[np.int64]:
    """Cluster of each expert [E], ``sizes`` [P] in each, pairs kept together."""
    pairs = pairs - np.diag(np.diagonal(pairs))
    if len(sizes) == 1:
        return np.zeros(len(pairs), np.int64)
    cluster_of = np.full(len(pairs), -1)
    busy = pairs.sum(axis=1)
    for label, size in enumerate(sizes):
        free = cluster_of < 0
        cluster_of[np.where(free, busy, -1.0).argmax()] = label
        for _ in range(size - 1):
            bond = pairs[:, cluster_of == label].sum(axis=1)
            cluster_of[np.where(cluster_of < 0, bond, -1.0).argmax()] = label
    return _swap(pairs, cluster_of, len(sizes), clock)


def _swap(
    pairs: Floats, cluster_of: NDArray[np.int64], num_clusters: int, clock: Clock
) -> NDArray[np.int64]:
    """Exchange the two experts that gain most, again and again."""
    experts = np.arange(len(pairs))
    bond = pairs @ np.eye(num_clusters)[cluster_of]  # [E, P]
    smallest = 1e-9 * max(float(pairs.max(initial=0.0)), 1.0)
    while clock.left > 0:
        own = bond[experts, cluster_of]
        gain = bond[:, cluster_of] - own[:, None]  # of a, if it took b's place
        gain = gain + gain.T - 2 * pairs
        gain[cluster_of[:, None] == cluster_of] = 0.0
        a, b = np.unravel_index(gain.argmax(), gain.shape)
        if gain[a, b] <= smallest:
            break
        here, there = cluster_of[a], cluster_of[b]
        bond[:, here] += pairs[:, b] - pairs[:, a]
        bond[:, there] += pairs[:, a] - pairs[:, b]
        cluster_of[a], cluster_of[b] = there, here
    return cluster_of
