from dataclasses import replace

import numpy as np
from hypothesis import given
from hypothesis import strategies as st
from moetuner.placement.topology import Topology
from moetuner.problem import Objective
from moetuner.solver import get_solver
from moetuner.solver.heuristics.lpt import balanced_rank_of, load_bounds
from oracle import oracle
from strategies import placement_problems, random_problem

LOADS = st.sampled_from([Objective.MAX_LOAD, Objective.LOAD_DEVIATION])


def test_lpt_balances_a_layer_worked_out_by_hand(rng):
    """7 + 1 and 5 + 3: the heaviest sits with the lightest."""
    problem = random_problem(rng, 1, 4, Topology(num_ranks=2, ranks_per_node=2))
    load = np.array([[5, 7, 1, 3]])
    problem = replace(problem, statistics=replace(problem.statistics, load=load))
    solution = get_solver("lpt").solve(problem)
    ranks = solution.placement.rank_of()[0]
    assert ranks[1] == ranks[2] != ranks[0] == ranks[3]
    assert solution.value == solution.lower_bound == 1.0


@given(placement_problems(max_experts=6, max_layers=1), LOADS)
def test_bounds_hold_for_the_optimum(case, objective):
    for slots in (0, 6):
        problem = replace(case[0], objective=objective, slots_per_rank=slots)
        bound = load_bounds(problem).mean()
        assert bound <= oracle(problem).value + 1e-12


@given(placement_problems(max_experts=8, shapes=((2, 1), (3, 1), (6, 3))))
def test_no_swap_of_two_experts_helps_the_fullest_rank(case):
    """What the refinement promises: a local optimum over exchanges."""
    problem, _ = case
    load, rank_of = problem.relative_load(), balanced_rank_of(problem)
    loads = problem.rank_loads(rank_of)
    for layer, on in enumerate(loads):
        full = on.argmax()
        for a in np.flatnonzero(rank_of[layer] == full):
            for b in np.flatnonzero(rank_of[layer] != full):
                moved = load[layer, a] - load[layer, b]
                after = max(on[full] - moved, on[rank_of[layer, b]] + moved)
                assert after >= on[full] - 1e-9
