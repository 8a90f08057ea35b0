"""Whether replicas are worth time: a few layers, searched without them, tell."""

from dataclasses import replace

import numpy as np
import pytest
from joint_problems import FakeTime, round_of
from moetuner.evaluation.cost import Homes
from moetuner.evaluation.workload import Workload
from moetuner.placement.topology import Topology
from moetuner.problem import PlacementProblem
from moetuner.solver import SolverOptions, base, get_solver
from moetuner.solver.heuristics.starts import quick_placements
from moetuner.solver.joint import incumbent
from moetuner.solver.joint.config import JointConfig
from moetuner.solver.joint.follow import FollowRounds
from moetuner.solver.joint.interruptible import Interruptible
from moetuner.solver.joint.layers import LayerRounds
from moetuner.solver.joint.profiles import choose_profile
from moetuner.solver.joint.replan import widened
from moetuner.solver.joint.replica_trial import (
    HOT_LAYERS,
    TRIAL_LAYERS,
    try_replicas,
)
from moetuner.solver.joint.scenarios import SearchProfile
from moetuner.solver.joint.some_layers import some_layers
from strategies import TOY_COST, make_trace, random_ids

TOPOLOGY = Topology(num_ranks=4, ranks_per_node=2)
LAYERS, EXPERTS = 30, 16
HOT = 18  # a layer that lies between those that are spread evenly


def deep_problem(cost, *, hot=False, extra=1, homes=Homes.UNIFORM):
    """Many layers; in one of them nearly all tokens choose the same expert, if hot."""
    rng = np.random.default_rng(5)
    ids = random_ids(rng, 200, LAYERS, EXPERTS, 2)
    if hot:
        others = rng.integers(1, EXPERTS, 200)
        ids[:, HOT] = np.stack([np.zeros(200, int), others], axis=1)
    trace = make_trace(
        ids, EXPERTS, ranked=True, sequence=np.arange(200, dtype=np.int32) // 10
    )
    workload = Workload(traces=(trace,), cost=replace(cost, homes=homes))
    return PlacementProblem.from_workload(
        workload, TOPOLOGY, slots_per_rank=EXPERTS // 4 + extra
    )


def reading_cost():
    """Weights are all that takes time: each replica is one more to read."""
    slow = replace(TOY_COST.hardware, memory_bandwidth=1e9, matmul_rate=1e18)
    return replace(TOY_COST, hardware=slow)


def computing_cost():
    """Rows are all that takes time."""
    slow = replace(TOY_COST.hardware, memory_bandwidth=1e18, matmul_rate=1e9)
    return replace(TOY_COST, hardware=slow)


def tried(problem, *, searches=False):
    trial = try_replicas(
        *(problem, SolverOptions(), SearchProfile(), Interruptible(), 1e6),
        searches=searches,
    )
    assert trial is not None
    return trial


def test_a_few_layers_are_spread_and_hold_the_hottest_expert():
    problem = deep_problem(TOY_COST, hot=True)
    few = some_layers(problem, TRIAL_LAYERS, HOT_LAYERS)
    layers = few.statistics.layer_ids
    assert {0, HOT, LAYERS - 1} <= set(layers.tolist())
    assert len(layers) <= TRIAL_LAYERS + HOT_LAYERS
    np.testing.assert_array_equal(few.statistics.load, problem.statistics.load[layers])
    assert few.slots_per_rank == problem.slots_per_rank
    assert HOT not in some_layers(problem, TRIAL_LAYERS).statistics.layer_ids


@pytest.mark.parametrize("hot", [0, HOT_LAYERS])
def test_layers_that_depend_on_each_other_stay_together(hot):
    """As many in a row, with the hottest expert among them where it is asked for."""
    problem = deep_problem(TOY_COST, hot=True, homes=Homes.FOLLOW)
    layers = some_layers(problem, TRIAL_LAYERS, hot).statistics.layer_ids
    first = int(layers[0])
    assert layers.tolist() == list(range(first, first + TRIAL_LAYERS + hot))
    assert not hot or HOT in layers


def test_of_several_traces_the_slowest_is_asked_with_all_layers():
    problem = deep_problem(TOY_COST)
    workload = problem.workload
    both = replace(workload, traces=2 * workload.traces, weights=(), worst_case=True)
    problem = replace(problem, workload=both)
    assert some_layers(problem, TRIAL_LAYERS) is problem


@pytest.mark.parametrize("homes", [Homes.UNIFORM, Homes.FOLLOW])
def test_replicas_that_every_layer_would_have_to_read_are_futile(homes):
    assert tried(deep_problem(reading_cost(), homes=homes)).is_futile


def test_no_search_is_made_where_a_balanced_plan_gains_nothing(monkeypatch):
    monkeypatch.setattr(LayerRounds, "round", None)  # nobody may call it
    for homes in (Homes.UNIFORM, Homes.FOLLOW):
        problem = deep_problem(reading_cost(), homes=homes)
        assert tried(problem, searches=True).is_futile


def test_one_hot_layer_of_many_is_seen():
    trial = tried(deep_problem(computing_cost(), hot=True))
    assert trial.gain > 0
    assert not trial.is_futile


def searched(monkeypatch, problem, limit=60.0, start=None, config=None):
    """(Slots, proposals) of the rounds of all layers, by a clock that rounds drive."""
    fake, made = FakeTime(), []

    def counting(method):
        brief = round_of(method, fake)

        def counted(rounds, proposals, seconds):
            if rounds.problem.num_layers == LAYERS:
                made.append((rounds.problem.slots_per_rank, proposals))
            return brief(rounds, proposals, seconds)

        return counted

    with monkeypatch.context() as patched:
        patched.setattr(base, "time", fake)
        patched.setattr(incumbent, "time", fake)
        for rounds in (LayerRounds, FollowRounds):
            patched.setattr(rounds, "round", counting(rounds.round))
        config = config or JointConfig(profile=SearchProfile(), patience=1000)
        found = get_solver("joint", config).solve(
            problem, SolverOptions(time_limit=limit, threads=1), warm_start=start
        )
    return found, made


@pytest.mark.parametrize("homes", [Homes.UNIFORM, Homes.FOLLOW])
def test_a_plan_with_spare_slots_is_searched_as_the_plan_without(monkeypatch, homes):
    """Where replicas do not pay, to see it takes nothing of the search."""
    tight, roomy = (
        deep_problem(reading_cost(), extra=extra, homes=homes) for extra in (0, 1)
    )
    start = quick_placements(tight)[-1]
    without, rounds = searched(monkeypatch, tight, start=start)
    found, of_roomy = searched(monkeypatch, roomy, start=widened(start, roomy))
    assert {slots for slots, _ in of_roomy} == {tight.slots_per_rank}
    assert of_roomy == rounds
    assert len(rounds) > 3
    assert found.value <= without.value * (1 + 1e-12)


def test_few_ranks_are_favoured_with_slots_to_spare_too(monkeypatch):
    """A plan that costs more time than where it could begin is wanted all the same."""
    tight, roomy = (deep_problem(reading_cost(), extra=extra) for extra in (0, 1))
    config = JointConfig(favour="few-ranks", rank_weight=1000, patience=1000)
    without, rounds = searched(monkeypatch, tight, config=config)
    found, of_roomy = searched(monkeypatch, roomy, config=config)
    assert without.value > min(map(tight.objective_value, quick_placements(tight)))
    assert of_roomy == rounds
    assert (found.placement.rank_of() == without.placement.rank_of()).all()


@pytest.mark.parametrize("homes", [Homes.UNIFORM, Homes.FOLLOW])
def test_more_slots_go_through_the_stages_of_fewer(homes):
    """By rounds: the same search first, then replicas, kept where they are faster."""
    solver = get_solver("joint", JointConfig(rounds=2, profile=SearchProfile()))
    options = SolverOptions(seed=1, time_limit=1000)
    before = []
    for extra in (0, 1, 2):
        problem = deep_problem(computing_cost(), hot=True, extra=extra, homes=homes)
        found = solver.solve(problem, options)
        stages = [(stage.name, stage.value) for stage in found.stages]
        assert stages[: len(before)] == before
        assert not before or found.value <= before[-1][1]
        before = stages


@pytest.mark.parametrize(
    ("seconds", "expected"),
    [
        (8.0, [8]),  # all trials of eight layers would take 8 s more
        (25.0, [8] + 10 * [24]),
        (1000.0, [8] + 10 * [LAYERS]),
        (np.inf, 10 * [LAYERS]),
    ],
)
def test_profiles_are_tried_on_as_many_layers_as_there_is_time_for(
    monkeypatch, seconds, expected
):
    """A tenth of a second for each layer, and ten trials."""
    fake, seen = FakeTime(), []

    def tenth(rounds, proposals, seconds):
        del proposals, seconds
        fake.now += 0.1 * rounds.problem.num_layers
        seen.append(rounds.problem.num_layers)
        return False

    monkeypatch.setattr(base, "time", fake)
    monkeypatch.setattr(LayerRounds, "round", tenth)
    problem = deep_problem(TOY_COST, extra=0)
    clock = base.Clock(time_limit=2000)
    choose_profile(problem, SolverOptions(), Interruptible(), clock, seconds)
    assert seen == expected
