"""The tests' oracle against an enumeration with no tricks, and the limits it keeps."""

import itertools
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from moetuner.errors import InvalidPlacementError
from moetuner.evaluation.cost import Homes
from moetuner.placement.topology import Topology
from moetuner.problem import Objective
from moetuner.solver.base import place
from oracle import oracle
from strategies import examples, placement_problems, random_problem, rename_experts


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


@examples(10)
@given(
    placement_problems(max_experts=4, max_layers=2, shapes=((2, 1), (2, 2))),
    st.sampled_from(Objective),
    st.sampled_from([0, 3]),
)
def test_oracle_finds_the_least_of_all(case, objective, slots):
    problem = replace(case[0], objective=objective, slots_per_rank=slots)
    found = oracle(problem)
    assert found.value == pytest.approx(best_of_all(problem), rel=1e-12, abs=1e-12)
    assert found.value == problem.objective_value(found.placement)


@examples(18)
@given(
    placement_problems(max_experts=5, max_layers=2), st.sampled_from(list(Objective))
)
def test_naming_experts_otherwise_changes_no_optimum(case, objective):
    problem, rng = case
    problem = replace(problem, objective=objective)
    order = rng.permutation(problem.num_experts)
    values = [oracle(each).value for each in (problem, rename_experts(problem, order))]
    assert values[0] == pytest.approx(values[1], rel=1e-12, abs=1e-12)


def test_what_cannot_be_enumerated_is_refused(rng):
    wide = random_problem(rng, 2, 16, Topology(num_ranks=4, ranks_per_node=4))
    with pytest.raises(ValueError, match="16 experts on 4 ranks have too many"):
        oracle(wide)
    deep = random_problem(rng, 6, 6, Topology(num_ranks=2, ranks_per_node=2))
    cost = replace(deep.workload.cost, homes=Homes.FOLLOW)
    workload = replace(deep.workload, cost=cost)
    deep = replace(deep, workload=workload, objective=Objective.MODELLED_TIME)
    with pytest.raises(ValueError, match="too many combinations"):
        oracle(deep)
