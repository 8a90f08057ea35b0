import itertools
import time
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from moetuner.errors import InvalidPlacementError, SolverError
from moetuner.evaluation.workload import Workload
from moetuner.placement.model import Placement
from moetuner.placement.topology import Topology
from moetuner.problem import Objective, PlacementProblem
from moetuner.solver import SolverOptions, SolveStatus, get_solver
from moetuner.solver.programs.cbc import CUTOFF_INCREMENT
from moetuner.solver.programs.free_sizes import even_out_sizes, memory_excess
from moetuner.solver.programs.ilp1 import Ilp1Config, Ilp1Solver, layer_values
from moetuner.trace import read_trace, split_by_sequence
from oracle import oracle
from strategies import examples, placement_problems, problem_of_counts, random_problem

LOADS = [Objective.LOAD_DEVIATION, Objective.MAX_LOAD]
EXACT = Ilp1Solver(config=Ilp1Config(gap_absolute=0.0))
QUICK = SolverOptions(time_limit=10, threads=2)


def free_sizes(**options):
    return Ilp1Solver(config=Ilp1Config(free_sizes=True, **options))


@pytest.mark.parametrize("objective", LOADS)
@examples(4)
@given(
    case=placement_problems(shapes=((2, 1), (2, 2), (3, 1))),
    slots=st.sampled_from([0, 4]),
)
def test_ilp1_finds_what_the_oracle_finds(objective, case, slots):
    problem = replace(case[0], objective=objective, slots_per_rank=slots)
    solution = EXACT.solve(problem, QUICK)
    truth = oracle(problem).value
    assert solution.status is SolveStatus.OPTIMAL
    assert solution.value == pytest.approx(truth, abs=1e-6)
    assert truth - 2.01 * CUTOFF_INCREMENT <= solution.lower_bound <= truth + 1e-9


@examples(3)
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
@examples(3)
@given(case=placement_problems(max_experts=7, shapes=((2, 1), (3, 3))))
def test_the_memory_row_holds_with_free_sizes(slack, case):
    """Where no placement can keep slack 0, the share not being whole, one is added."""
    problem, _ = case
    whole = problem.num_experts * problem.num_layers % problem.topology.num_ranks == 0
    slack = slack if whole else max(slack, 1)
    problem = replace(problem, objective=Objective.LOAD_DEVIATION)
    solution = free_sizes(gap_absolute=0.0, memory_slack=slack).solve(problem, QUICK)
    totals = problem.rank_sizes(solution.placement.rank_of()).sum(axis=0)
    assert np.abs(totals - totals.mean()).max() <= slack
    relaxed = free_sizes(gap_absolute=0.0).solve(problem, QUICK)
    assert solution.lower_bound <= relaxed.value + 1e-6
    assert solution.value >= relaxed.value - 1e-6


@pytest.mark.parametrize("objective", LOADS)
@examples(4)
@given(case=placement_problems(max_layers=1, shapes=((2, 1), (2, 2), (3, 1))))
def test_free_sizes_find_the_best_where_no_rank_is_idle(objective, case):
    problem = replace(case[0], objective=objective)
    solution = free_sizes(gap_absolute=0.0).solve(problem, QUICK)
    ranks = problem.topology.num_ranks
    values = []
    for choice in itertools.product(range(ranks), repeat=problem.num_experts):
        if len(set(choice)) == ranks:
            values.append(layer_values(problem, np.array([choice]))[0])
    assert solution.value == pytest.approx(min(values), abs=1e-6)
    assert solution.placement.rank_sizes().min() >= 1


def test_free_sizes_refuse_a_warm_start_that_they_would_not_make(rng):
    problem = random_problem(
        rng,
        2,
        6,
        Topology(num_ranks=2, ranks_per_node=2),
        objective=Objective.LOAD_DEVIATION,
    )
    uneven = Placement.from_rank_of(
        np.array([[0] * 5 + [1], [0, 0, 0, 1, 1, 1]]),
        layer_ids=problem.statistics.layer_ids,
        topology=problem.topology,
    )
    solution = free_sizes().solve(problem, QUICK, warm_start=uneven)
    assert solution.placement.slots_per_rank <= 6
    with pytest.raises(InvalidPlacementError, match=r"\[8, 4\] experts over all"):
        free_sizes(memory_slack=1).solve(problem, QUICK, warm_start=uneven)
    idle = Placement.from_rank_of(
        np.zeros((2, 6), np.int32),
        layer_ids=problem.statistics.layer_ids,
        topology=problem.topology,
    )
    with pytest.raises(InvalidPlacementError, match="without experts"):
        free_sizes().solve(problem, QUICK, warm_start=idle)
    with pytest.raises(InvalidPlacementError, match="holds 5 experts on a rank"):
        EXACT.solve(problem, QUICK, warm_start=uneven)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"memory_slack": 1}, "needs free_sizes=True"),
        ({"free_sizes": True, "memory_slack": -1}, "whole number >= 0, got -1"),
        ({"free_sizes": True, "memory_slack": float("nan")}, "whole number >= 0"),
    ],
)
def test_senseless_options_are_refused(options, message):
    with pytest.raises(SolverError, match=message):
        Ilp1Config(**options)


def test_evening_out_renames_clusters_only():
    """Sizes 3, 1 then 3, 1: the second layer's large cluster goes to rank 1."""
    rank_of = np.array([[0, 0, 0, 1], [0, 1, 0, 0]], np.int32)
    evened = even_out_sizes(rank_of, 2)
    assert evened.tolist() == [[0, 0, 0, 1], [1, 0, 1, 1]]


def test_memory_excess_is_rounded_up():
    """7 experts on 2 ranks: nobody holds 3.5, so 4 + 3 is one off."""
    assert memory_excess(np.array([[4, 3]])) == 1
    assert memory_excess(np.array([[5, 2]])) == 2


@pytest.mark.parametrize("objective", LOADS)
def test_with_the_memory_row_it_claims_no_optimum_that_it_lacks(objective):
    """The heaviest expert is best alone, but the row wants three to a rank."""
    load = np.array([[100, 50, 50, 1, 1, 1, 1, 1, 1]])
    problem = problem_of_counts(
        load, Topology(num_ranks=3, ranks_per_node=3), objective=objective
    )
    solution = free_sizes(memory_slack=0).solve(problem, QUICK)
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
    problem = PlacementProblem.from_workload(
        Workload(traces=(split_by_sequence(trace).plan,)),
        Topology(num_ranks=8, ranks_per_node=4),
        objective=Objective.LOAD_DEVIATION,
    )
    began = time.monotonic()
    solution = Ilp1Solver().solve(problem, SolverOptions(time_limit=2, threads=threads))
    assert time.monotonic() - began < 60  # of the hours that its programs would take
    assert solution.status is SolveStatus.TIME_LIMIT
    assert 0 <= solution.lower_bound < solution.value
    assert solution.value <= get_solver("lpt").solve(problem).value
