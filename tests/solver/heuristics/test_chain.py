import itertools
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from moetuner.evaluation.rates import Bandwidth
from moetuner.placement.topology import Topology
from moetuner.problem import Objective
from moetuner.solver import SolveStatus, get_solver
from moetuner.solver.base import place
from moetuner.solver.heuristics.chain import align_layers
from strategies import examples, placement_problems, random_problem

TRAFFIC = st.sampled_from([Objective.TOTAL_TRAFFIC, Objective.LINK_TRAFFIC])


def best_naming(problem, clusters):
    """The least objective over all names (ranks) of the clusters of every layer."""
    names = [
        np.array(p) for p in itertools.permutations(range(problem.topology.num_ranks))
    ]
    best = np.inf
    for choice in itertools.product(names, repeat=len(clusters)):
        rank_of = np.stack([p[row] for p, row in zip(choice, clusters, strict=True)])
        best = min(best, problem.objective_value(place(problem, rank_of)))
    return best


@examples(15)
@given(
    placement_problems(max_experts=7, max_layers=3, shapes=((2, 1), (3, 1), (3, 3))),
    TRAFFIC,
)
def test_with_one_link_speed_no_naming_of_the_clusters_is_better(case, objective):
    problem = replace(case[0], objective=objective)
    solution = get_solver("chain").solve(problem)
    (stage,) = solution.stages
    assert stage.status is SolveStatus.OPTIMAL
    assert stage.lower_bound == stage.value == solution.value
    best = best_naming(problem, solution.placement.rank_of())
    assert solution.value == pytest.approx(best, rel=1e-12, abs=1e-15)


def test_total_traffic_is_exact_with_two_link_speeds_too(rng):
    """It does not see speeds; the slowest link does, and then the chain is greedy."""
    two_nodes = Topology(num_ranks=4, ranks_per_node=2)
    problem = random_problem(rng, 2, 8, two_nodes, objective=Objective.TOTAL_TRAFFIC)
    solution = get_solver("chain").solve(problem)
    assert solution.stages[0].status is SolveStatus.OPTIMAL
    best = best_naming(problem, solution.placement.rank_of())
    assert solution.value == pytest.approx(best, rel=1e-12)
    slowest = replace(problem, objective=Objective.LINK_TRAFFIC)
    (stage,) = get_solver("chain").solve(slowest).stages
    assert (stage.status, stage.lower_bound) == (SolveStatus.HEURISTIC, None)


def test_where_links_differ_nothing_is_claimed_to_be_optimal(rng):
    one_node = Topology(num_ranks=4, ranks_per_node=4)
    problem = random_problem(rng, 2, 8, one_node, objective=Objective.LINK_TRAFFIC)
    workload = problem.workload
    assert get_solver("chain").solve(problem).stages[0].lower_bound is not None
    narrow = replace(
        workload.cost.hardware,
        rank_bandwidth=Bandwidth(egress=(2e9,), ingress=(1e9, 2e9, 2e9, 2e9)),
    )
    cost = replace(workload.cost, hardware=narrow)
    problem = replace(problem, workload=replace(workload, cost=cost))
    assert get_solver("chain").solve(problem).stages[0].lower_bound is None


def test_a_permuted_layer_is_put_back(rng):
    """Every token keeps its cluster, so nothing has to travel."""
    problem = random_problem(
        rng,
        2,
        6,
        Topology(num_ranks=3, ranks_per_node=3),
        objective=Objective.TOTAL_TRAFFIC,
    )
    counts = replace(problem.statistics, transitions=np.eye(6, dtype=np.int64)[None])
    problem = replace(problem, statistics=counts)
    clusters = np.array([[0, 0, 1, 1, 2, 2], [2, 2, 0, 0, 1, 1]], np.int32)
    aligned = align_layers(problem, clusters)
    assert aligned.tolist() == [[0, 0, 1, 1, 2, 2]] * 2
