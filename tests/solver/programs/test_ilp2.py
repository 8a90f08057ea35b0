import itertools
import time
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from moetuner.evaluation.cost import CostModel
from moetuner.evaluation.models import shape_for_model
from moetuner.evaluation.rates import Bandwidth
from moetuner.evaluation.workload import Workload
from moetuner.placement.topology import Topology
from moetuner.problem import Objective, PlacementProblem
from moetuner.solver import SolverOptions, SolveStatus
from moetuner.solver.programs.cbc import CUTOFF_INCREMENT
from moetuner.solver.programs.ilp2 import Ilp2Config, Ilp2Solver, pair_bounds
from moetuner.trace import read_trace, split_by_sequence
from strategies import examples, placement_problems, random_problem

EXACT = Ilp2Solver(config=Ilp2Config(force_ilp=True, gap_relative=0.0))
QUICK = SolverOptions(time_limit=20, threads=2)
TWO_NODES = Topology(num_ranks=4, ranks_per_node=2)


def best_naming(problem, clusters):
    """The slowest-link sum, least over all names of clusters: a shortest path."""
    num_ranks = problem.topology.num_ranks
    names = [np.array(p) for p in itertools.permutations(range(num_ranks))]
    seconds = problem.link_seconds()
    best = np.zeros(len(names))
    for flow in problem.rank_flows(clusters):
        # p[a] and q[b] are the ranks of cluster a and of b one layer later.
        cost = [[(flow * seconds[np.ix_(p, q)]).max() for q in names] for p in names]
        best = (best[:, None] + cost).min(axis=0)
    return best.min()


@examples(3)
@given(
    placement_problems(
        max_experts=8,
        max_layers=3,
        shapes=((4, 2),),
        objective=Objective.LINK_TRAFFIC,
    )
)
def test_with_two_link_speeds_no_naming_of_the_clusters_is_better(case):
    problem, _ = case
    solution = EXACT.solve(problem, QUICK)
    stage = solution.stages[-1]
    best = best_naming(problem, solution.placement.rank_of())
    assert stage.status is SolveStatus.OPTIMAL
    assert stage.value == solution.value == pytest.approx(best, rel=1e-6, abs=1e-15)
    # The increment is of the start's value, which the best is more than a tenth of.
    assert stage.lower_bound == pytest.approx(best, rel=10 * CUTOFF_INCREMENT)
    assert stage.lower_bound <= best * (1 + 1e-9)


@examples(3)
@given(
    placement_problems(
        max_experts=8,
        shapes=((2, 1), (3, 3), (4, 1), (4, 4)),
        objective=Objective.LINK_TRAFFIC,
    )
)
def test_with_one_link_speed_the_program_equals_the_assignment(case):
    problem, _ = case
    by_program, by_assignment = (
        Ilp2Solver(config=Ilp2Config(force_ilp=force, gap_relative=0.0))
        .solve(problem, QUICK)
        .stages[-1]
        for force in (True, False)
    )
    assert by_program.value == pytest.approx(by_assignment.value, rel=1e-6, abs=1e-15)
    assert by_program.status is by_assignment.status is SolveStatus.OPTIMAL


@given(
    placement_problems(
        max_experts=8,
        max_layers=2,
        shapes=((2, 1), (3, 3), (4, 2)),
        objective=Objective.LINK_TRAFFIC,
    )
)
def test_pair_bounds_hold_for_every_naming(case):
    problem, rng = case
    row = np.arange(problem.num_experts) % problem.topology.num_ranks
    clusters = rng.permuted(np.tile(row, (problem.num_layers, 1)), axis=1)
    bound = pair_bounds(problem, problem.rank_flows(clusters)).sum()
    assert bound <= best_naming(problem, clusters) * (1 + 1e-12)


def with_pairs(problem, rng, kinds=None):
    """The problem on ranks of which each pair has a bandwidth of its own."""
    ranks = problem.topology.num_ranks
    rates = rng.uniform(1e9, 2e11, (ranks, ranks))
    if kinds is not None:
        rates = rng.choice(kinds, (ranks, ranks))
    np.fill_diagonal(rates, 0.0)
    workload = problem.workload
    machine = replace(
        workload.cost.hardware,
        ranks_per_node=problem.topology.ranks_per_node,
        pair_bandwidth=rates.tolist(),
    )
    cost = replace(workload.cost, hardware=machine)
    return replace(problem, workload=replace(workload, cost=cost))


PAIRED = placement_problems(
    max_experts=8,
    max_layers=3,
    shapes=((3, 3), (4, 2), (4, 4)),
    objective=Objective.LINK_TRAFFIC,
)


@examples(5)
@given(PAIRED, st.sampled_from([None, [1e9, 1e11]]))
def test_where_each_pair_has_its_speed_no_naming_of_the_clusters_is_better(case, kinds):
    problem, rng = case
    problem = with_pairs(problem, rng, kinds)
    solution = EXACT.solve(problem, QUICK)
    stage = solution.stages[-1]
    best = best_naming(problem, solution.placement.rank_of())
    assert stage.status is SolveStatus.OPTIMAL
    assert stage.value == solution.value == pytest.approx(best, rel=1e-6, abs=1e-15)
    assert stage.lower_bound <= best * (1 + 1e-9)


@given(PAIRED)
def test_pair_bounds_hold_where_each_pair_has_its_speed(case):
    problem, rng = case
    problem = with_pairs(problem, rng)
    row = np.arange(problem.num_experts) % problem.topology.num_ranks
    clusters = rng.permuted(np.tile(row, (problem.num_layers, 1)), axis=1)
    bound = pair_bounds(problem, problem.rank_flows(clusters)).sum()
    assert bound <= best_naming(problem, clusters) * (1 + 1e-12)


def test_ports_that_differ_are_pairs_that_differ(rng):
    problem = random_problem(rng, 2, 8, TWO_NODES, objective=Objective.LINK_TRAFFIC)
    workload = problem.workload
    narrow = replace(
        workload.cost.hardware,
        rank_bandwidth=Bandwidth(egress=(2e9,), ingress=(1e9, 2e9)),
    )
    cost = replace(workload.cost, hardware=narrow)
    problem = replace(problem, workload=replace(workload, cost=cost))
    assert not problem.alike_links
    solution = EXACT.solve(problem, QUICK)
    best = best_naming(problem, solution.placement.rank_of())
    assert solution.value == pytest.approx(best, rel=1e-6)


def test_both_stages_are_told(rng):
    problem = random_problem(rng, 3, 8, TWO_NODES, objective=Objective.LINK_TRAFFIC)
    solution = Ilp2Solver().solve(problem, QUICK)
    balance, traffic = solution.stages
    assert balance.objective is Objective.LOAD_DEVIATION
    assert traffic.objective is Objective.LINK_TRAFFIC
    assert traffic.value == solution.value
    # The bound of a stage is for its clusters; other clusters may need less.
    assert solution.lower_bound is None
    assert solution.status is SolveStatus.HEURISTIC
    as_balance = replace(problem, objective=Objective.LOAD_DEVIATION)
    assert as_balance.objective_value(solution.placement) == pytest.approx(
        balance.value, rel=1e-12
    )


def test_progress_of_the_second_stage_is_in_seconds_of_the_objective(rng):
    problem = random_problem(rng, 6, 8, TWO_NODES, objective=Objective.LINK_TRAFFIC)
    events = []
    solution = EXACT.solve(
        problem, SolverOptions(time_limit=20, threads=2), progress=events.append
    )
    second = [event for event in events if event.stage == "ilp2"]
    assert second
    assert second[-1].done == 1
    for event in second:
        assert event.incumbent >= solution.value * (1 - 1e-5)
        assert event.bound is None or event.bound <= solution.value * (1 + 1e-5)


def test_a_program_too_large_for_cbc_is_not_built(rng):
    """128 ranks: the assignment chain answers within seconds, with a bound."""
    problem = random_problem(
        rng,
        2,
        128,
        Topology(num_ranks=128, ranks_per_node=8),
        objective=Objective.LINK_TRAFFIC,
    )
    stage = Ilp2Solver().solve(problem, SolverOptions(time_limit=2)).stages[-1]
    assert stage.status is SolveStatus.TIME_LIMIT
    assert 0 < stage.lower_bound <= stage.value


def test_the_time_limit_holds_for_a_real_trace(traces_dir):
    trace = read_trace(traces_dir / "gpt-oss-20b-fingerprinting" / "mmlu.npz")
    cost = CostModel(shape=shape_for_model(trace.metadata.model))
    problem = PlacementProblem.from_workload(
        Workload(traces=(split_by_sequence(trace).plan,), cost=cost),
        Topology(num_ranks=8, ranks_per_node=4),
        objective=Objective.LINK_TRAFFIC,
    )
    began = time.monotonic()
    solution = Ilp2Solver().solve(problem, SolverOptions(time_limit=2, threads=2))
    assert time.monotonic() - began < 60  # of the hours that its programs would take
    stage = solution.stages[-1]
    assert 0 < stage.lower_bound < stage.value
