"""Spare slots: simple rules, layer by layer, and more of them are never worse."""

from dataclasses import replace

import numpy as np
import pytest
from joint_problems import FakeTime, round_of
from moetuner.evaluation.cost import Homes, Wire
from moetuner.evaluation.workload import Workload
from moetuner.placement.topology import Topology
from moetuner.problem import Objective, PlacementProblem
from moetuner.solver import SolverOptions, base, get_solver
from moetuner.solver.base import Clock
from moetuner.solver.heuristics.starts import quick_placements
from moetuner.solver.joint import incumbent, replica_trial, run
from moetuner.solver.joint.config import JointConfig
from moetuner.solver.joint.layers import LayerRounds
from moetuner.solver.joint.replan import widened
from moetuner.solver.joint.replicas import (
    cheapest_layers,
    filled,
    layer_costs,
    relieve_busiest,
    replicate_busiest,
    spread_replicas,
    without_spare,
)
from moetuner.solver.joint.scenarios import SearchProfile
from moetuner.solver.joint.tokens import TokenRounds
from moetuner.trace import CountTrace
from moetuner.trace.generator import TOPIC_PRESETS, topic_trace
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
    placements = list(filled(problem, quick_placements(problem)))
    found = cheapest_layers(problem, placements, CLOCK)
    best = problem.workload.layer_seconds(found[0])
    by_layer = [problem.workload.layer_seconds(each) for each in placements]
    np.testing.assert_allclose(best, np.min(by_layer, axis=0), rtol=1e-12)


def test_without_time_only_the_first_is_looked_at(rng):
    problem = roomy_problem(rng)
    placements = list(filled(problem, quick_placements(problem)))
    found = cheapest_layers(problem, placements, Clock(time_limit=0))
    assert [each.sha256() for each in found] == 2 * [placements[0].sha256()]


def test_where_homes_follow_the_best_placement_is_whole(rng):
    problem = roomy_problem(rng, homes=Homes.FOLLOW)
    placements = list(filled(problem, quick_placements(problem)))
    values = [problem.objective_value(each) for each in placements]
    found = cheapest_layers(problem, placements, CLOCK)[0]
    assert problem.objective_value(found) == min(values)


@pytest.mark.parametrize("homes", list(Homes)[::2], ids=lambda homes: homes.value)
def test_more_slots_are_never_worse(homes):
    """Nor worse than EPLB with them, or than replicas by a simple rule on the plan."""
    solver = get_solver("joint", JointConfig(rounds=2))
    options = SolverOptions(seed=1, time_limit=1000)
    before, placements = np.inf, []
    for extra in (0, 1, 2, 4):
        problem = roomy_problem(np.random.default_rng(7), homes, extra)
        found = solver.solve(problem, options)
        assert found.value <= before * (1 + 1e-12)
        assert found.placement.slots_per_rank == problem.slots_per_rank
        for rival in filled(problem, placements):
            assert found.value <= problem.objective_value(rival) * (1 + 1e-12)
        before, placements = found.value, [*placements, found.placement]


def assert_more_slots_are_never_worse(layers, experts, topology, tokens):
    preset = replace(
        TOPIC_PRESETS["deepseek-v3"], num_layers=layers, num_experts=experts
    )
    workload = Workload(traces=(topic_trace(preset, num_tokens=tokens, seed=1),))
    solver = get_solver("joint", JointConfig(rounds=1))
    options = SolverOptions(seed=1, time_limit=10_000)
    tight = PlacementProblem.from_workload(workload, topology)
    before = solver.solve(tight, options)
    for extra in (1, 2):
        roomy = replace(tight, slots_per_rank=tight.min_slots + extra)
        found = solver.solve(roomy, options)
        assert found.value <= before.value
        greedy = relieve_busiest(roomy, before.placement)
        assert found.value <= roomy.objective_value(greedy)
        before = found


@pytest.mark.parametrize(
    ("experts", "ranks", "per_node"), [(32, 8, 8), (64, 16, 4), (256, 64, 8)]
)
def test_more_slots_are_never_worse_on_machines_of_all_sizes(experts, ranks, per_node):
    topology = Topology(num_ranks=ranks, ranks_per_node=per_node)
    assert_more_slots_are_never_worse(2, experts, topology, 600)


def test_without_time_a_walk_begins_at_the_plan_that_is_held(rng, monkeypatch):
    begun = []
    begin = TokenRounds.begin

    def without_time(rounds, placements, clock):
        begin(rounds, placements, Clock(time_limit=1e-9))
        begun.append(rounds.placement)

    monkeypatch.setattr(TokenRounds, "begin", without_time)
    solver = get_solver("joint", JointConfig(favour="few-ranks", rounds=1))
    solver.solve(roomy_problem(rng), SolverOptions(time_limit=1000))
    assert not begun[-1].has_replicas


@pytest.mark.slow
def test_more_slots_are_never_worse_with_58_layers_of_256_experts_on_64_ranks():
    topology = Topology(num_ranks=64, ranks_per_node=8)
    assert_more_slots_are_never_worse(58, 256, topology, 2048)


def test_relief_takes_what_lowers_the_fullest_rank_and_then_stops(rng):
    """The fullest rank never has more than before."""
    problem = roomy_problem(rng, extra=2)
    load = problem.statistics.load
    for start in quick_placements(problem):
        full = relieve_busiest(problem, start)
        problem.check(full)
        for layer in range(problem.num_layers):
            fullest = []
            for placement in (start, full):
                slots = placement.slot_experts[layer].reshape(TOPOLOGY.num_ranks, -1)
                holds = np.array([np.isin(np.arange(16), rank) for rank in slots])
                fullest.append((holds @ (load[layer] / holds.sum(axis=0))).max())
            assert fullest[1] <= fullest[0]


def test_a_hot_expert_is_relieved_first():
    """One expert has half of all rows: every rank gets a replica of it."""
    problem = roomy_problem(np.random.default_rng(0), extra=1)
    load = np.ones_like(problem.statistics.load)
    load[:, 5] = 15
    hot = replace(problem, statistics=replace(problem.statistics, load=load))
    tight = quick_placements(without_spare(hot))[0]
    full = relieve_busiest(hot, tight)
    assert (full.num_replicas()[:, 5] == TOPOLOGY.num_ranks).all()


@pytest.mark.parametrize("pays", [True, False])
@pytest.mark.parametrize("limit", [10.0, 40.0, 200.0])
def test_a_solve_ends_within_its_limit(monkeypatch, limit, pays):
    """A valuation takes 1 s, a round all that it may take and a little more."""
    fake = FakeTime()

    def taking(method, seconds):
        def work(*args, **options):
            fake.now += seconds(*args)
            return method(*args, **options)

        return work

    monkeypatch.setattr(base, "time", fake)
    monkeypatch.setattr(incumbent, "time", fake)
    for name in ("layer_seconds", "seconds"):
        method = taking(getattr(Workload, name), lambda *_: 1.0)
        monkeypatch.setattr(Workload, name, method)
    for rounds in (LayerRounds, TokenRounds):
        brief = round_of(rounds.round, fake)
        monkeypatch.setattr(rounds, "round", brief)
    score = taking(TokenRounds.score, lambda *_: 0.5)
    monkeypatch.setattr(TokenRounds, "score", score)
    monkeypatch.setattr(run, "PAYING_GAIN", -1.0 if pays else 1.0)
    problem = roomy_problem(np.random.default_rng(7))
    config = JointConfig(profile=SearchProfile())
    found = get_solver("joint", config).solve(
        problem, SolverOptions(time_limit=limit, threads=1)
    )
    problem.check(found.placement)
    assert fake.now <= 1.1 * limit + 1.0


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


def test_of_counts_a_single_layer_has_replicas_where_all_together_gain_little(
    rng, monkeypatch
):
    """Also where to fill slots takes far longer than to value them: 58 x 256, say."""
    problem = counted_problem(rng, 5)
    counts = np.full_like(problem.workload.traces[0].counts, 1_000_000)
    counts[:, 1, 3] = 3_000_000  # one expert of one layer
    trace = replace(problem.workload.traces[0], counts=counts)
    workload = replace(problem.workload, traces=(trace,))
    problem = PlacementProblem.from_workload(
        workload, problem.topology, slots_per_rank=5
    )
    fake = FakeTime()

    def slow(*arguments):
        for placement in filled(*arguments):
            fake.now += 2.0
            yield placement

    monkeypatch.setattr(base, "time", fake)
    monkeypatch.setattr(incumbent, "time", fake)
    for module in (run, replica_trial):
        monkeypatch.setattr(module, "filled", slow)
    monkeypatch.setattr(LayerRounds, "round", round_of(LayerRounds.round, fake))
    monkeypatch.setattr(run, "PAYING_GAIN", 1.0)
    config = JointConfig(profile=SearchProfile(), patience=1000)
    solver, limit = get_solver("joint", config), SolverOptions(time_limit=40, threads=1)
    found = solver.solve(problem, limit)
    assert fake.now <= 44.0
    assert found.placement.num_replicas()[1, 3] > 1
    assert (found.placement.num_replicas()[0] == 1).all()
    tight = solver.solve(without_spare(problem), limit).placement
    costs = layer_costs(problem, widened(tight, problem))
    assert layer_costs(problem, found.placement)[1] < costs[1]
