import itertools
import time
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from moetuner.placement.topology import Topology
from moetuner.problem import Objective, PlacementProblem
from moetuner.solver import SolverOptions, SolveStatus, get_solver
from moetuner.solver.programs.cbc import CUTOFF_INCREMENT
from moetuner.solver.programs.ilp1 import Ilp1Config, Ilp1Solver, layer_values
from moetuner.trace import read_trace, split_by_sequence
from moetuner.trace.statistics import RoutingStatistics
from strategies import placement_problems, random_problem

LOADS = [Objective.LOAD_DEVIATION, Objective.MAX_LOAD]
EXACT = Ilp1Solver(config=Ilp1Config(gap_absolute=0.0))
QUICK = SolverOptions(time_limit=10, threads=2)


@pytest.mark.parametrize("objective", LOADS)
@settings(max_examples=8)
@given(
    case=placement_problems(shapes=((2, 1), (2, 2), (3, 1))),
    sizes=st.sampled_from([{}, {"slots_per_rank": 4}, {"equal_slots": False}]),
)
def test_ilp1_finds_what_the_oracle_finds(objective, case, sizes):
    problem = replace(case[0], objective=objective, **sizes)
    solution = EXACT.solve(problem, QUICK)
    truth = get_solver("oracle").solve(problem).value
    assert solution.status is SolveStatus.OPTIMAL
    assert solution.value == pytest.approx(truth, abs=1e-6)
    assert truth - 2.01 * CUTOFF_INCREMENT <= solution.lower_bound <= truth + 1e-9


@settings(max_examples=6)
@given(placement_problems(shapes=((2, 1), (3, 1))), st.sampled_from(LOADS))
def test_naming_experts_otherwise_changes_no_optimum(case, objective):
    problem, rng = case
    problem = replace(problem, objective=objective)
    order = rng.permutation(problem.num_experts)
    renamed = replace(problem.statistics, load=problem.statistics.load[:, order])
    values = [
        EXACT.solve(replace(problem, statistics=counts), QUICK).value
        for counts in (problem.statistics, renamed)
    ]
    assert values[0] == pytest.approx(values[1], abs=1e-6)


@pytest.mark.parametrize("slack", [0, 1, 3])
@settings(max_examples=5)
@given(case=placement_problems(max_experts=7, shapes=((2, 1), (3, 3))))
def test_the_memory_row_holds_with_free_sizes(slack, case):
    """Where no placement can keep slack 0, the share not being whole, one is added."""
    problem, _ = case
    whole = problem.num_experts * problem.num_layers % problem.topology.num_ranks == 0
    slack = slack if whole else max(slack, 1)
    problem = replace(
        problem,
        objective=Objective.LOAD_DEVIATION,
        equal_slots=False,
        memory_slack=slack,
    )
    solution = EXACT.solve(problem, QUICK)
    totals = problem.rank_sizes(solution.placement.rank_of()).sum(axis=0)
    assert np.abs(totals - totals.mean()).max() <= slack
    relaxed = EXACT.solve(replace(problem, memory_slack=None), QUICK)
    assert solution.lower_bound <= relaxed.value + 1e-6
    assert solution.value >= relaxed.value - 1e-6


@pytest.mark.parametrize("objective", LOADS)
def test_with_the_memory_row_it_claims_no_optimum_that_it_lacks(objective):
    """The heaviest expert is best alone, but the row wants three to a rank."""
    load = np.array([[100, 50, 50, 1, 1, 1, 1, 1, 1]])
    problem = PlacementProblem(
        statistics=RoutingStatistics(
            num_tokens=103, layer_ids=np.array([0], np.int32), load=load
        ),
        topology=Topology(num_ranks=3, ranks_per_node=3),
        objective=objective,
        equal_slots=False,
        memory_slack=0,
    )
    solution = Ilp1Solver().solve(problem, QUICK)
    assert solution.value <= get_solver("lpt").solve(problem).value
    assert solution.value - solution.lower_bound > 0.02
    assert solution.status is SolveStatus.HEURISTIC
    assert solution.stages[0].status is SolveStatus.HEURISTIC


@pytest.mark.parametrize("objective", LOADS)
def test_never_worse_than_lpt_on_its_own_objective(objective, rng):
    """And better on some layers: the program is worth its time.

    With fewer experts LPT and its swaps often find the optimum by themselves.
    """
    problem = random_problem(
        rng, 6, 16, Topology(num_ranks=4, ranks_per_node=2), objective=objective
    )
    start = get_solver("lpt").solve(problem)
    found = Ilp1Solver().solve(problem, QUICK)
    assert found.value < start.value
    before, after = (
        layer_values(problem, solution.placement.rank_of())
        for solution in (start, found)
    )
    assert (after <= before).all()
    assert after.mean() == pytest.approx(found.value, rel=1e-12)


def test_progress_tells_incumbents_that_fall_and_bounds_that_rise(rng):
    problem = random_problem(
        rng,
        3,
        16,
        Topology(num_ranks=4, ranks_per_node=2),
        objective=Objective.LOAD_DEVIATION,
    )
    events = []
    solution = Ilp1Solver().solve(
        problem, SolverOptions(time_limit=3, threads=2), progress=events.append
    )
    assert events[-1].done <= events[-1].total == 3
    for before, after in itertools.pairwise(events):
        assert after.incumbent <= before.incumbent
        assert after.bound >= before.bound
        assert after.done >= before.done
    assert events[-1].bound <= solution.value


@pytest.mark.parametrize("threads", [1, 2])
def test_the_time_limit_holds_for_a_real_trace(traces_dir, threads):
    trace = read_trace(traces_dir / "gpt-oss-20b-fingerprinting" / "mmlu.npz")
    problem = PlacementProblem(
        statistics=RoutingStatistics.from_trace(split_by_sequence(trace).plan),
        topology=Topology(num_ranks=8, ranks_per_node=4),
        objective=Objective.LOAD_DEVIATION,
    )
    began = time.monotonic()
    solution = Ilp1Solver().solve(problem, SolverOptions(time_limit=2, threads=threads))
    assert time.monotonic() - began < 2 + 1.5
    assert solution.status is SolveStatus.TIME_LIMIT
    assert 0 <= solution.lower_bound < solution.value
    assert solution.value <= get_solver("lpt").solve(problem).value
