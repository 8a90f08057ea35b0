"""The oracle against an enumeration with no tricks, and the limits it keeps."""

import itertools
import time
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from moetuner.errors import InvalidPlacementError, SolverError
from moetuner.placement.topology import Topology
from moetuner.problem import Objective
from moetuner.solver import SolverOptions, SolveStatus, get_solver
from moetuner.solver.base import place
from strategies import placement_problems, random_problem, rename_experts


def best_of_all(problem):
    """The least objective over every rank of every expert of every layer."""
    ranks, shape = problem.topology.num_ranks, problem.statistics.load.shape
    best = np.inf
    for choice in itertools.product(range(ranks), repeat=shape[0] * shape[1]):
        try:
            placement = place(problem, np.array(choice).reshape(shape))
            best = min(best, problem.objective_value(placement))
        except InvalidPlacementError:
            continue
    return best


@settings(max_examples=15)
@given(
    placement_problems(max_experts=4, max_layers=2, shapes=((2, 1), (2, 2))),
    st.sampled_from(Objective),
    st.sampled_from(
        [{}, {"slots_per_rank": 3}, {"equal_slots": False}]
        + [{"equal_slots": False, "memory_slack": slack} for slack in (1, 2)]
    ),
)
def test_oracle_finds_the_least_of_all(case, objective, sizes):
    problem, _ = case
    problem = replace(problem, objective=objective, **sizes)
    solution = get_solver("oracle").solve(problem)
    assert solution.status is SolveStatus.OPTIMAL
    assert solution.value == pytest.approx(best_of_all(problem), rel=1e-12, abs=1e-12)


@given(
    placement_problems(max_experts=5, max_layers=2), st.sampled_from(list(Objective))
)
def test_naming_experts_otherwise_changes_no_optimum(case, objective):
    problem, rng = case
    problem = replace(problem, objective=objective)
    order = rng.permutation(problem.num_experts)
    values = [
        get_solver("oracle").solve(each).value
        for each in (problem, rename_experts(problem, order))
    ]
    assert values[0] == pytest.approx(values[1], rel=1e-12, abs=1e-12)


def test_what_cannot_be_enumerated_is_refused(rng):
    wide = random_problem(rng, 2, 16, Topology(num_ranks=4, ranks_per_node=4))
    with pytest.raises(SolverError, match="16 experts on 4 ranks is too large"):
        get_solver("oracle").solve(wide)
    two = Topology(num_ranks=2, ranks_per_node=2)
    for experts, message in ((14, "placements of one layer"), (6, "combinations")):
        deep = random_problem(rng, 6, experts, two, equal_slots=False, memory_slack=1)
        with pytest.raises(SolverError, match=message):
            get_solver("oracle").solve(deep)


def test_an_impossible_memory_row_is_said(rng):
    """Three experts never share two ranks equally in one layer."""
    problem = random_problem(
        rng,
        1,
        3,
        Topology(num_ranks=2, ranks_per_node=2),
        equal_slots=False,
        memory_slack=0,
    )
    with pytest.raises(SolverError, match="no placement keeps memory_slack=0"):
        get_solver("oracle").solve(problem)


def test_the_oracle_stops_in_time_and_then_claims_no_bound(rng):
    problem = random_problem(
        rng,
        24,
        10,
        Topology(num_ranks=2, ranks_per_node=1),
        objective=Objective.LINK_TRAFFIC,
        equal_slots=False,
    )
    began = time.monotonic()
    solution = get_solver("oracle").solve(problem, SolverOptions(time_limit=0.2))
    assert time.monotonic() - began < 1.0
    assert solution.status is SolveStatus.TIME_LIMIT
    assert solution.lower_bound is None
    assert solution.value == problem.objective_value(solution.placement)
