"""The search that walks tokens: replicas, recorded homes and homes that follow."""

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from joint_problems import (
    NOTHING_MORE,
    big_problem,
    exchange_seconds,
    modelled,
    problems,
)
from moetuner.evaluation.cost import Homes, Wire
from moetuner.solver import SolverOptions
from moetuner.solver.base import place
from moetuner.solver.heuristics.starts import start_ranks
from moetuner.solver.joint.interruptible import Interruptible
from moetuner.solver.joint.solver import JointConfig, JointSolver
from moetuner.solver.joint.tokens import TokenRounds
from strategies import random_placement


def walk_of(problem, profile=NOTHING_MORE, replicas=False, seed=0):
    return TokenRounds(
        problem=problem,
        options=SolverOptions(seed=seed, threads=2),
        profile=profile,
        runner=Interruptible(),
        replicas=replicas,
    )


def move(walk, slots, proposals, seed=1, sweeps=2):
    stop = np.zeros(1, np.int32)
    return walk.anneal(
        slots, proposals, 60.0, seed, stop, hot=0.5, cold=0.01, sweeps=sweeps
    )


@given(problems(homes=(Homes.RECORDED,)), st.booleans())
def test_a_walk_from_recorded_homes_costs_the_modelled_time(case, replicas):
    problem, rng = case
    walk = walk_of(problem, replicas=replicas)
    placement = random_placement(
        rng, problem.workload.traces[0], problem.topology, int(replicas)
    )
    asked = replace(problem, slots_per_rank=placement.slots_per_rank)
    for proposals in (0, 100):
        slots, cost = move(walk, placement.slot_experts, proposals)
        found = replace(placement, slot_experts=slots)  # legal, or this raises
        value = asked.objective_value(found)
        constant = 0.0
        if problem.workload.cost.wire is Wire.ALLGATHER:
            constant = exchange_seconds(problem, found)
        assert cost.sum() + constant == pytest.approx(value, rel=1e-9)


@given(
    problems(homes=(Homes.FOLLOW, Homes.RECORDED, Homes.UNIFORM)),
    st.booleans(),
    st.sampled_from([0.0, 2.0]),
)
def test_changes_along_tokens_add_up_to_the_cost_computed_afresh(
    case, replicas, weight
):
    """Only one layer moves, so that its neighbours are what they were."""
    problem, rng = case
    (trace,) = problem.workload.traces
    profile = replace(
        NOTHING_MORE, peak=weight, pooled=weight, variance=weight, rank_copies=weight
    )
    walk = walk_of(problem, profile, replicas)
    placement = random_placement(rng, trace, problem.topology, int(replicas))
    slots, cost = move(walk, placement.slot_experts, 200, sweeps=1)
    _, fresh = move(walk, slots, 0, sweeps=1)
    # Odd layers came last: even ones saw the odd ones' old places.
    layers = slice(1, None, 2) if problem.workload.cost.homes is Homes.FOLLOW else ...
    assert cost[layers] == pytest.approx(fresh[layers], rel=1e-9)


def test_the_walk_does_not_depend_on_threads(rng):
    problem = modelled(big_problem(rng))
    follow = replace(problem.workload.cost, homes=Homes.FOLLOW)
    problem = replace(problem, workload=replace(problem.workload, cost=follow))
    solver = JointSolver(config=JointConfig(rounds=2))
    rows = [
        solver.solve(problem, SolverOptions(threads=threads)).placement.slot_experts
        for threads in (1, 2)
    ]
    assert rows[0].tolist() == rows[1].tolist()
    starts = [problem.objective_value(place(problem, s)) for s in start_ranks(problem)]
    solution = solver.solve(problem)
    assert solution.value < min(starts)


def test_spare_slots_take_replicas_that_pay(rng):
    problem = modelled(big_problem(rng))
    compute_bound = replace(
        problem.workload.cost,
        hardware=replace(
            problem.workload.cost.hardware, matmul_rate=1e10, memory_bandwidth=1e15
        ),
    )
    problem = replace(problem, workload=replace(problem.workload, cost=compute_bound))
    solver, options = (
        JointSolver(config=JointConfig(rounds=2)),
        SolverOptions(threads=2),
    )
    alone = solver.solve(problem, options)
    spare = replace(problem, slots_per_rank=5)
    solution = solver.solve(spare, options, warm_start=alone.placement)
    assert solution.placement.has_replicas
    assert solution.placement.slots_per_rank == 5
    assert solution.value < alone.value
    assert solution.value == spare.objective_value(solution.placement)
