"""Affinity alone and co-activation alone: what they promise, and what they neglect."""

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from moetuner.errors import MissingStatisticsError
from moetuner.evaluation.workload import Workload
from moetuner.placement.topology import Topology
from moetuner.problem import Objective, PlacementProblem
from moetuner.solver import get_solver
from moetuner.solver.base import Clock
from moetuner.solver.heuristics.coactivation import cluster, coactivation_of
from oracle import oracle
from strategies import (
    make_trace,
    placement_problems,
    problem_of_counts,
    random_problem,
)
from zipf_trace import zipf_trace


@given(placement_problems(max_experts=6, shapes=((2, 1), (3, 3), (4, 2))))
def test_affinity_keeps_at_least_what_blocks_keep(case):
    problem = replace(case[0], objective=Objective.TOTAL_TRAFFIC)
    blocks = get_solver("contiguous").solve(problem)
    one_level = replace(
        problem,
        topology=Topology(
            num_ranks=problem.topology.num_ranks,
            ranks_per_node=problem.topology.num_ranks,
        ),
    )
    found = get_solver("affinity").solve(one_level)
    assert found.value <= get_solver("contiguous").solve(one_level).value + 1e-12
    assert blocks.value >= oracle(problem).value - 1e-12


def test_affinity_follows_partners_across_layers():
    """With affinity 1 a token's experts are partners all the way: nothing moves."""
    trace = zipf_trace(
        num_tokens=2000, num_layers=4, num_experts=8, top_k=1, affinity=1.0
    )
    for topology in (
        Topology(num_ranks=4, ranks_per_node=4),
        Topology(num_ranks=4, ranks_per_node=2),
    ):
        problem = PlacementProblem.from_workload(
            Workload(traces=(trace,)),
            topology,
            objective=Objective.TOTAL_TRAFFIC,
        )
        assert get_solver("affinity").solve(problem).value == 0
        assert get_solver("contiguous").solve(problem).value > 0.5


def test_clusters_hold_what_is_chosen_together():
    """Tokens choose {0, 3}, {1, 4} or {2, 5}: three clusters of two, nothing cut."""
    ids = np.array([[[0, 3]], [[4, 1]], [[2, 5]]] * 5, np.int16)
    problem = PlacementProblem.from_workload(
        Workload(traces=(make_trace(ids, 6),)),
        Topology(num_ranks=3, ranks_per_node=1),
    )
    ranks = get_solver("coactivation").solve(problem).placement.rank_of()[0]
    assert (ranks[:3] == ranks[3:]).all()
    assert sorted(ranks[:3].tolist()) == [0, 1, 2]


def test_no_swap_keeps_more_pairs_together(rng):
    pairs = rng.integers(0, 50, (12, 12)).astype(float)
    pairs = pairs + pairs.T
    sizes = np.array([4, 4, 2, 2])
    found = cluster(pairs, sizes, Clock(time_limit=60))
    assert np.bincount(found).tolist() == sizes.tolist()

    def kept(clusters):
        same = clusters[:, None] == clusters
        return (pairs * same).sum() - np.trace(pairs)

    for a in range(12):
        for b in range(a):
            swapped = found.copy()
            swapped[[a, b]] = swapped[[b, a]]
            assert kept(swapped) <= kept(found) + 1e-9


def test_coactivation_is_counted_where_it_is_missing(rng):
    problem = random_problem(rng, 2, 6, Topology(num_ranks=2, ranks_per_node=1))
    lean = replace(problem, statistics=replace(problem.statistics, coactivation=None))
    np.testing.assert_array_equal(coactivation_of(lean), coactivation_of(problem))
    bare = problem_of_counts(problem.statistics.load, problem.topology)
    with pytest.raises(MissingStatisticsError, match="needs same-layer co-activation"):
        get_solver("coactivation").solve(bare)
