"""Baselines beside a plan: in their part of the time, and never better than it."""

import re
from dataclasses import replace

import numpy as np
import pytest
from moetuner.evaluation.cost import CostModel, Homes
from moetuner.evaluation.workload import Workload
from moetuner.placement.moves import fetched_replicas
from moetuner.placement.topology import Topology
from moetuner.planning import baselines as baselines_module
from moetuner.planning.baselines import NO_TIME, QUICK, Baselines, solve_baselines
from moetuner.planning.beside import MIN_SOLVER_SECONDS, SCORE_MARGIN, Beside
from moetuner.planning.held_layers import held_layers
from moetuner.planning.options import PlanOptions
from moetuner.planning.plan import plan_trace
from moetuner.planning.recordings import split_recordings
from moetuner.problem import PlacementProblem
from moetuner.solver import SolverOptions, get_solver
from moetuner.solver.base import Clock, SolveStatus
from moetuner.solver.joint.config import JointConfig
from moetuner.solver.joint.profiles import Favour
from strategies import make_trace, random_ids

MACHINE = Topology(num_ranks=4, ranks_per_node=2)


@pytest.fixture
def trace(rng):
    sequence = (np.arange(600) // 20).astype(np.int32)
    return make_trace(random_ids(rng, 600, 3, 16, 2, skew=2.0), 16, sequence=sequence)


def problem_of(trace, slots=0):
    workload = Workload(traces=(trace,), cost=CostModel())
    return PlacementProblem.from_workload(workload, MACHINE, slots_per_rank=slots)


def beside_of(trace, seconds, **fields):
    options = PlanOptions(solver_options=SolverOptions(time_limit=60), **fields)
    return Beside(
        problem=problem_of(trace),
        recordings=split_recordings((trace,), 0.5, 0),
        options=options,
        clock=seconds,
    )


class HandClock(Clock):
    """A clock that is moved by hand."""

    now = 0.0

    @property
    def seconds(self):
        return self.now


def test_without_time_only_the_first_is_there_and_others_say_why(trace):
    found = solve_baselines(
        problem_of(trace), Baselines.QUICK, SolverOptions(), clock=Clock(time_limit=0)
    )
    assert list(found.solutions) == ["contiguous"]
    assert set(found.left_out.values()) == {NO_TIME}
    assert set(found.left_out) == set(QUICK) - {"contiguous", "eplb+replica"}


def test_none_is_begun_once_their_part_of_the_time_is_up(trace):
    """Each takes 8 s of 60: a third is gone after three of them."""
    clock = HandClock(time_limit=20)

    def take(name, solution):
        clock.now += 8

    found = solve_baselines(
        problem_of(trace), Baselines.QUICK, SolverOptions(), clock=clock, on_solved=take
    )
    assert list(found.solutions) == list(QUICK[:3])


def test_the_solver_gets_what_is_left_but_for_its_own_scores(trace):
    clock = HandClock(time_limit=60)
    beside = beside_of(trace, clock)
    beside.solve_quick(Baselines.UNPLANNED)
    assert set(beside.measured[0]) == {"contiguous", "random"}
    clock.now = 30
    beside._score_seconds = 5.0
    assert beside.limited(1).time_limit == pytest.approx(30 - 5 * SCORE_MARGIN)
    assert beside.limited(2).time_limit == pytest.approx(15 - 5 * SCORE_MARGIN)
    clock.now = 61
    assert beside.limited(1).time_limit == MIN_SOLVER_SECONDS


def test_ctrl_c_while_a_baseline_is_solved_keeps_those_before(trace, monkeypatch):
    solve = baselines_module._solve

    def press_at_eplb(problem, name, options):
        if name == "eplb":
            raise KeyboardInterrupt
        return solve(problem, name, options)

    monkeypatch.setattr(baselines_module, "_solve", press_at_eplb)
    options = PlanOptions(solver_options=SolverOptions(time_limit=600))
    comparison = plan_trace(trace, MACHINE, options)
    assert [each.name for each in comparison.candidates][:1] == ["contiguous"]
    assert comparison.left_out["eplb"] == "the plan was interrupted"
    assert comparison.result.solution.status is SolveStatus.INTERRUPTED
    assert comparison.result.placement.provenance.status == "interrupted"


@pytest.mark.parametrize("homes", ["uniform", "recorded"])
def test_after_ctrl_c_nothing_large_is_valued_before_the_plan_is_there(
    trace, monkeypatch, homes
):
    if homes == "recorded":
        trace = replace(trace, home_rank=(np.arange(600) % 4).astype(np.int16))
    solve, value = baselines_module._solve, PlacementProblem.objective_value
    pressed, solved = [], []

    def press_at_chain(problem, name, options):
        if name == "chain":
            pressed.append(name)
            raise KeyboardInterrupt
        return solve(problem, name, options)

    def not_any_more(problem, placement):
        assert solved or not pressed
        return value(problem, placement)

    monkeypatch.setattr(baselines_module, "_solve", press_at_chain)
    monkeypatch.setattr(PlacementProblem, "objective_value", not_any_more)
    cost = CostModel(homes=Homes(homes))
    options = PlanOptions(solver_options=SolverOptions(time_limit=600), cost=cost)
    comparison = plan_trace(trace, MACHINE, options, on_solved=solved.append)
    result = comparison.result.solution
    assert pressed
    assert solved[0].provenance.status == "interrupted"
    part = split_recordings((trace,), options.plan_fraction, 0)[0].plan
    seconds = Workload(traces=(part,), cost=cost).seconds(result.placement)
    assert result.value == pytest.approx(seconds, rel=1e-9)


@pytest.mark.parametrize("limit", [1e-3, 3.0])
@pytest.mark.parametrize("slots", [0, 5, 6])
def test_the_result_is_never_worse_than_what_stands_beside_it(trace, slots, limit):
    options = PlanOptions(
        solver_options=SolverOptions(time_limit=limit, threads=2), slots_per_rank=slots
    )
    comparison = plan_trace(trace, MACHINE, options)
    problem = PlacementProblem.from_workload(
        Workload(traces=(split_recordings((trace,), 0.5, 0)[0].plan,)),
        MACHINE,
        slots_per_rank=slots,
    )
    value = problem.objective_value(comparison.result.placement)
    assert value == comparison.result.solution.value
    for each in comparison.candidates:
        assert value <= problem.objective_value(each.placement) * (1 + 1e-12)


def test_a_better_slow_baseline_becomes_the_result(trace):
    """What is solved after the plan is a floor too."""
    beside = beside_of(trace, HandClock(time_limit=60))
    beside.solve_quick(Baselines.QUICK)
    worst, best = (
        choose(
            beside.solutions.values(),
            key=lambda each: beside.problem.objective_value(each.placement),
        )
        for choose in (max, min)
    )
    slow = beside.improved(worst)
    assert slow.value <= beside.problem.objective_value(best.placement)
    assert slow.value == beside.problem.objective_value(slow.placement)


@pytest.mark.parametrize("solver", ["lpt", "eplb"])
def test_a_baseline_that_is_asked_for_is_itself(trace, solver):
    options = PlanOptions(solver=solver, solver_options=SolverOptions(time_limit=60))
    comparison = plan_trace(trace, MACHINE, options)
    own = solve_baselines(
        problem_of(split_recordings((trace,), 0.5, 0)[0].plan),
        Baselines.QUICK,
        SolverOptions(),
        among=(solver,),
    )
    np.testing.assert_array_equal(
        comparison.result.placement.slot_experts,
        own.solutions[solver].placement.slot_experts,
    )


def test_few_ranks_are_not_traded_for_time(trace):
    config = JointConfig(favour=Favour.FEW_RANKS)
    beside = beside_of(trace, HandClock(time_limit=60), config=config)
    beside.solve_quick(Baselines.QUICK)
    assert beside.start() is None


def few_ranks(trace, homes="uniform", limit=60, **config):
    """Remote ranks that nearly drown the time, of a model of many rows."""
    joint = JointConfig(favour="few-ranks", rank_weight=1000, rounds=2, **config)
    return PlanOptions(
        solver_options=SolverOptions(time_limit=limit, threads=2),
        config=joint,
        cost=CostModel(homes=homes),
    )


@pytest.mark.parametrize("homes", ["uniform", "follow"])
def test_few_ranks_cost_no_more_time_than_the_fastest_baseline(trace, homes):
    """As few layers as are needed are the baselines', and a stage says so."""
    trace = replace(trace, ranked=True)
    options = few_ranks(trace, homes)
    part = split_recordings((trace,), 0.5, 0)[0].plan
    problem = PlacementProblem.from_workload(
        Workload(traces=(part,), cost=options.cost), MACHINE
    )
    alone = get_solver("joint", options.config).solve(problem, options.solver_options)
    comparison = plan_trace(trace, MACHINE, options)
    result = comparison.result.solution
    least = min(
        problem.objective_value(each.placement)
        for each in comparison.candidates
        if each is not comparison.result
    )
    assert alone.value > least
    assert result.value <= least * (1 + 1e-12)
    assert result.value == pytest.approx(problem.objective_value(result.placement))
    told = result.stages[-1]
    assert re.fullmatch(r"[123] of 3 layers from the baselines: faster", told.name)
    assert told.value == result.value == result.placement.provenance.value


def test_what_is_no_slower_is_left_as_it_is(trace):
    options = replace(
        few_ranks(trace), config=JointConfig(favour="few-ranks", rounds=2)
    )
    comparison = plan_trace(trace, MACHINE, replace(options, baselines="none"))
    assert comparison.result.solution.value < comparison.baseline.solution.value
    assert "faster" not in comparison.result.solution.stages[-1].name


def test_few_ranks_from_a_placement_in_use_cost_no_more_than_it_takes(trace):
    blocks = plan_trace(trace, MACHINE, PlanOptions(solver="lpt")).result.placement
    problem = problem_of(split_recordings((trace,), 0.5, 0)[0].plan)
    before = problem.objective_value(blocks)
    options = few_ranks(trace, stay=blocks, move_seconds=before * 1e-3)
    alone = get_solver("joint", options.config).solve(problem, options.solver_options)
    result = plan_trace(trace, MACHINE, options).result
    values = [
        problem.objective_value(each)
        + fetched_replicas(blocks, each).size * before * 1e-3
        for each in (alone.placement, result.placement)
    ]
    assert values[0] > before * (1 + 1e-12)
    assert values[1] <= before * (1 + 1e-12)
    assert "from the placement in use: faster" in result.solution.stages[-1].name


@pytest.mark.parametrize(("seconds", "layers"), [(0.0, 8), (1e9, 3)])
def test_layers_that_lose_most_are_replaced_first_and_no_more_than_needed(
    seconds, layers
):
    rng = np.random.default_rng(2)
    ids = random_ids(rng, 400, 8, 16, 2, skew=2.0)
    problem = problem_of(make_trace(ids, 16))
    fast = get_solver("lpt").solve(replace(problem, objective="max-load")).placement
    slots = np.array(fast.slot_experts)
    by_load = np.argsort(-problem.statistics.load, axis=1)
    for layer in (1, 4, 6):  # all busy experts on one rank
        slots[layer] = by_load[layer]
    plan = replace(fast, slot_experts=slots)
    found, number = held_layers(
        *(problem, plan, fast, problem.objective_value),
        problem.objective_value(fast) * (1 + 1e-12),
        lambda: seconds,
    )
    assert number == layers
    np.testing.assert_array_equal(found.slot_experts, fast.slot_experts)


def test_a_plan_that_counts_moves_takes_of_the_baselines_what_is_worth_them(trace):
    """The value with moves is never above that of the placement in use."""
    part = split_recordings((trace,), 0.5, 0)[0].plan
    problem = problem_of(part)
    stay = solve_baselines(problem, Baselines.NONE, SolverOptions()).solutions
    stay = stay["contiguous"].placement
    for move_seconds in (0.0, 1.0):
        config = JointConfig(stay=stay, move_seconds=move_seconds)
        options = PlanOptions(
            solver_options=SolverOptions(time_limit=3, threads=2), config=config
        )
        result = plan_trace(trace, MACHINE, options).result.placement
        moved = fetched_replicas(stay, result).size
        before = problem.objective_value(stay)
        assert problem.objective_value(result) + moved * move_seconds <= before
        assert (moved > 0) == (move_seconds < 1)
