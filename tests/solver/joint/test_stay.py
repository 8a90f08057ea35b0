"""Planning anew around a placement in use: what is moved must pay."""

from dataclasses import replace

import numpy as np
import pytest
from joint_problems import big_problem, modelled
from moetuner.placement.moves import fetched_replicas, replicas_of
from moetuner.solver import get_solver
from moetuner.solver.base import place
from moetuner.solver.heuristics.starts import start_ranks
from moetuner.solver.joint.replan import layers_that_pay
from moetuner.solver.joint.solver import JointConfig, JointSolver


def test_the_dearer_moves_are_the_fewer_are_made(rng):
    problem = modelled(big_problem(rng))
    stay = place(problem, start_ranks(problem)[0])
    unit = problem.objective_value(stay) * 1e-4
    values, moves = [], []
    for each in (0.0, unit, 1.0):
        config = JointConfig(stay=stay, move_seconds=each, rounds=4)
        solution = JointSolver(config=config).solve(problem)
        moved = int((solution.placement.rank_of() != stay.rank_of()).sum())
        assert solution.value + each * moved <= problem.objective_value(stay)
        values.append(solution.value)
        moves.append(moved)
    assert moves[0] > moves[1] > moves[2] == 0
    assert max(values[:2]) < values[2]


def with_slots(problem, spare):
    return replace(problem, slots_per_rank=problem.slots_per_rank + spare)


def test_spare_slots_are_filled_around_what_is_in_use(rng):
    problem = with_slots(modelled(big_problem(rng)), 1)
    stay = place(problem, start_ranks(problem)[0])
    filled = []
    for each in (0.0, 1.0):
        config = JointConfig(stay=stay, move_seconds=each, rounds=2)
        solution = JointSolver(config=config).solve(problem)
        problem.check(solution.placement)
        copies = fetched_replicas(stay, solution.placement).size
        assert solution.value + each * copies <= problem.objective_value(stay)
        filled.append(solution.placement)
    assert filled[0].has_replicas
    np.testing.assert_array_equal(replicas_of(filled[1]), replicas_of(stay))


def test_a_placement_in_use_may_hold_replicas(rng):
    problem = with_slots(modelled(big_problem(rng)), 1)
    stay = get_solver("eplb").solve(problem).placement
    assert stay.has_replicas
    value = problem.objective_value(stay)
    saved, moves = [], []
    for each in (0.0, value * 1e-4, 1.0):
        config = JointConfig(stay=stay, move_seconds=each, rounds=2)
        solution = JointSolver(config=config).solve(problem)
        problem.check(solution.placement)
        copies = fetched_replicas(stay, solution.placement).size
        assert solution.value + each * copies <= value
        saved.append(value - solution.value)
        moves.append(copies)
    assert moves[0] >= moves[1] > moves[2] == 0
    assert saved[0] > 0
    assert saved[1] > 0


def test_layers_pay_each_for_itself(rng):
    """Whichever layers are taken, no other choice of layers costs less."""
    problem = modelled(big_problem(rng))
    base, other = (place(problem, rank_of) for rank_of in start_ranks(problem)[:2])
    unit = 1e-4 * problem.objective_value(base)
    for stay, move_seconds in ((base, 0.0), (base, unit), (other, unit)):
        found = layers_that_pay(
            problem, base, other, stay=stay, move_seconds=move_seconds
        )

        def cost(placement, stay=stay, each=move_seconds):
            moved = fetched_replicas(stay, placement).size
            return problem.objective_value(placement) + each * moved

        for layer in range(problem.num_layers):
            slots = found.slot_experts.copy()
            mine = (slots[layer] == base.slot_experts[layer]).all()
            source = other if mine else base
            slots[layer] = source.slot_experts[layer]
            changed = replace(found, slot_experts=slots)
            assert cost(found) <= cost(changed) * (1 + 1e-12)
    assert problem.workload.layer_seconds(base).sum() == pytest.approx(
        problem.objective_value(base)
    )
