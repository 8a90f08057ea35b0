"""Spare slots: simple rules, layer by layer, and more of them are never worse."""

from dataclasses import replace

import numpy as np
import pytest
from moetuner.evaluation.cost import Homes, Wire
from moetuner.evaluation.workload import Workload
from moetuner.placement.topology import Topology
from moetuner.problem import Objective, PlacementProblem
from moetuner.solver import SolverOptions, get_solver
from moetuner.solver.base import Clock
from moetuner.solver.heuristics.starts import quick_placements
from moetuner.solver.joint.config import JointConfig
from moetuner.solver.joint.replicas import (
    cheapest_layers,
    filled,
    replicate_busiest,
    spread_replicas,
)
from moetuner.trace import CountTrace
from strategies import TOY_COST, random_problem

CLOCK = Clock(time_limit=1000)
TOPOLOGY = Topology(num_ranks=4, ranks_per_node=2)


def roomy_problem(rng, homes=Homes.UNIFORM, extra=1):
    problem = random_problem(
        rng, 3, 16, TOPOLOGY, slots_per_rank=4 + extra, objective="modelled-time"
    )
    cost = replace(problem.workload.cost, homes=homes)
    return replace(problem, workload=replace(problem.workload, cost=cost))


def counted_problem(rng, slots_per_rank):
    load = 10_000 * rng.zipf(1.5, (4, 2, 16)).clip(max=500)
    trace = CountTrace(
        counts=load,
        num_tokens=np.full(4, 10_000_000),
        layer_ids=np.arange(2, dtype=np.int32),
    )
    workload = Workload(traces=(trace,), cost=replace(TOY_COST, wire=Wire.ALLGATHER))
    return PlacementProblem.from_workload(
        workload, TOPOLOGY, slots_per_rank=slots_per_rank
    )


@pytest.mark.parametrize("fill", [spread_replicas, replicate_busiest])
def test_every_spare_slot_is_filled_and_none_twice_on_a_rank(rng, fill):
    problem = roomy_problem(rng, extra=2)
    for placement in quick_placements(problem):
        full = fill(problem, placement)
        problem.check(full)
        assert (full.slot_experts >= 0).all()
        for rank in full.slot_experts.reshape(-1, problem.slots_per_rank):
            assert np.unique(rank).size == rank.size


def test_a_slot_for_every_expert_on_every_rank(rng):
    problem = roomy_problem(rng, extra=13)
    full = spread_replicas(problem, quick_placements(problem)[0])
    assert (full.num_replicas() == TOPOLOGY.num_ranks).all()


def test_each_layer_is_as_in_the_placement_where_it_takes_least(rng):
    problem = roomy_problem(rng)
    placements = filled(problem, quick_placements(problem))
    best = problem.workload.layer_seconds(cheapest_layers(problem, placements, CLOCK))
    by_layer = [problem.workload.layer_seconds(each) for each in placements]
    np.testing.assert_allclose(best, np.min(by_layer, axis=0), rtol=1e-12)


def test_without_time_only_the_first_is_looked_at(rng):
    problem = roomy_problem(rng)
    placements = filled(problem, quick_placements(problem))
    found = cheapest_layers(problem, placements, Clock(time_limit=0))
    assert found.sha256() == placements[0].sha256()


def test_where_homes_follow_the_best_placement_is_whole(rng):
    problem = roomy_problem(rng, homes=Homes.FOLLOW)
    placements = filled(problem, quick_placements(problem))
    values = [problem.objective_value(each) for each in placements]
    assert problem.objective_value(cheapest_layers(problem, placements, CLOCK)) == min(
        values
    )


@pytest.mark.parametrize("homes", list(Homes)[::2], ids=lambda homes: homes.value)
def test_more_slots_are_never_worse(rng, homes):
    """Nor worse than EPLB with them, or than replicas by a simple rule on the plan."""
    solver = get_solver("joint", JointConfig(rounds=2))
    options = SolverOptions(seed=1, time_limit=1000)
    before = np.inf
    for extra in (0, 1, 2, 4):
        problem = roomy_problem(np.random.default_rng(7), homes, extra)
        found = solver.solve(problem, options)
        assert found.value <= before * (1 + 1e-12) or extra > 1
        if not extra:
            before, tight = found.value, found.placement
            continue
        assert found.placement.slots_per_rank == problem.slots_per_rank
        for rival in filled(problem, [tight]):
            assert found.value <= problem.objective_value(rival) * (1 + 1e-12)


def test_counts_plan_with_replicas(rng):
    """The busiest expert's rows are shared, so the fullest rank has fewer."""
    solver = get_solver("joint", JointConfig(rounds=2))
    tight, roomy = (counted_problem(np.random.default_rng(3), n) for n in (4, 6))
    without = solver.solve(tight, SolverOptions(time_limit=1000))
    found = solver.solve(roomy, SolverOptions(time_limit=1000))
    assert roomy.objective is Objective.MODELLED_TIME
    assert found.placement.has_replicas
    assert found.value < without.value
    eplb = get_solver("eplb").solve(roomy)
    assert found.value <= eplb.value
