"""Programs of the objective itself: proofs, starts, honest gaps, refusals, Ctrl-C."""

import itertools
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from moetuner.errors import SolverError
from moetuner.evaluation.cost import Homes, Wire
from moetuner.evaluation.workload import Workload
from moetuner.placement.topology import Topology
from moetuner.problem import Objective, PlacementProblem
from moetuner.solver import SolverOptions, SolveStatus, get_solver
from moetuner.solver.base import place
from moetuner.solver.heuristics.starts import quick_placements
from moetuner.solver.programs import ilp
from moetuner.solver.programs.cbc import MilpResult
from moetuner.solver.programs.ilp import IlpConfig, IlpSolver
from moetuner.trace import CountTrace
from oracle import oracle
from strategies import (
    TOY_COST,
    examples,
    make_trace,
    random_ids,
    random_placement,
    random_problem,
)
from tiny import tiny_problems

ONE = SolverOptions(time_limit=600, threads=1)
FOUR = Topology(num_ranks=4, ranks_per_node=2)


def timed(problem, **changes):
    cost = replace(problem.workload.cost, **changes)
    workload = replace(problem.workload, cost=cost)
    return replace(problem, workload=workload, objective=Objective.MODELLED_TIME)


def eight_experts(rng, num_layers=3, topology=FOUR, **cost):
    return timed(random_problem(rng, num_layers, 8, topology), **cost)


@examples(6)
@given(tiny_problems(), st.sampled_from([Homes.UNIFORM, Homes.RECORDED]))
def test_it_proves_what_the_oracle_finds(case, homes):
    """Recorded homes may need no row at all: then the proof leaves latencies out."""
    problem = timed(case[0], homes=homes)
    problem = replace(problem, workload=replace(problem.workload, worst_case=False))
    truth = oracle(problem).value
    solution = IlpSolver().solve(problem, ONE)
    latencies = homes is Homes.RECORDED
    assert all(stage.status is SolveStatus.OPTIMAL for stage in solution.stages)
    if not latencies:
        assert solution.value == pytest.approx(truth, rel=1e-6, abs=1e-15)
    if problem.spare_slots:
        assert solution.lower_bound is None
        assert solution.status is SolveStatus.HEURISTIC
        return
    assert solution.lower_bound <= truth * (1 + 1e-9) + 1e-18
    if not latencies:
        assert solution.status is SolveStatus.OPTIMAL
        assert solution.lower_bound == pytest.approx(truth, rel=1e-5, abs=1e-15)


@pytest.mark.parametrize("wire", list(Wire))
def test_layers_are_proven_one_by_one_and_add_up(rng, wire):
    problem = eight_experts(rng, wire=wire)
    truth = get_solver("exact").solve(problem)
    told = []
    solution = IlpSolver().solve(problem, ONE, progress=told.append)
    assert solution.status is SolveStatus.OPTIMAL
    assert solution.value == pytest.approx(truth.value, rel=1e-6)
    assert solution.lower_bound <= truth.value * (1 + 1e-9)
    assert [stage.name for stage in solution.stages] == [
        "layer 0",
        "layer 1",
        "layer 2",
    ]
    layers = problem.workload.layer_seconds(solution.placement)
    assert [stage.value for stage in solution.stages] == layers.tolist()
    assert sum(layers) == pytest.approx(solution.value, rel=1e-12)
    assert sum(stage.lower_bound for stage in solution.stages) == pytest.approx(
        solution.lower_bound
    )
    assert told[-1].done == told[-1].total == problem.num_layers
    assert told[-1].bound == pytest.approx(solution.lower_bound)
    for before, after in itertools.pairwise(told):
        assert after.incumbent <= before.incumbent
        assert after.bound >= before.bound


def test_it_is_better_than_the_quick_methods_and_never_worse_than_its_start(rng):
    problem = eight_experts(rng)
    quick = min(map(problem.objective_value, quick_placements(problem)))
    solution = IlpSolver().solve(problem, ONE)
    assert solution.value < quick
    start = random_placement(rng, problem.workload.traces[0], problem.topology)
    again = IlpSolver().solve(problem, ONE, warm_start=start)
    assert again.value < problem.objective_value(start)


def test_what_the_evaluator_does_not_confirm_is_not_taken(rng, monkeypatch):
    """A program that read the worst placement for the best would do no harm."""
    problem = eight_experts(rng, num_layers=1)
    worse = np.arange(8, dtype=np.int32) % 4
    best = IlpSolver().solve(problem, ONE)
    assert problem.objective_value(place(problem, worse[None])) > best.value
    monkeypatch.setattr(ilp.LayerProgram, "read", lambda *_: worse)
    solution = IlpSolver().solve(problem, ONE, warm_start=best.placement)
    assert solution.value == best.value


def test_a_layer_too_large_for_a_program_is_told_with_what_counting_proves(rng):
    """Of two layers, one has two sets of experts, the other all of them."""
    ids = random_ids(rng, 300, 2, 8, 2)
    ids[:, 1] = np.where(rng.random((300, 1)) < 0.5, [0, 1], [2, 3])
    problem = PlacementProblem.from_workload(
        Workload(traces=(make_trace(ids, 8),), cost=TOY_COST), FOUR
    )
    solver = IlpSolver(config=IlpConfig(max_visits=60))
    solution = solver.solve(problem, ONE)
    large, small = solution.stages
    assert large.name == "layer 0: no program, too large"
    assert large.status is SolveStatus.HEURISTIC
    assert 0 < large.lower_bound < large.value
    assert small.status is SolveStatus.OPTIMAL
    assert small.gap < 1e-5
    assert solution.status is SolveStatus.HEURISTIC
    assert solution.lower_bound == pytest.approx(large.lower_bound + small.lower_bound)
    truth = get_solver("exact").solve(problem).value
    assert solution.lower_bound <= truth <= solution.value


def replaced(monkeypatch, result_of):
    """CBC that solves the first program, and has ``result_of(it)`` for the others."""
    real = ilp.solve_milps

    def some(models, **options):
        first = real(models[:1], **options)
        return first + [result_of(first[0])] * (len(models) - 1)

    monkeypatch.setattr(ilp, "solve_milps", some)


@pytest.mark.parametrize(
    "status", [SolveStatus.TIME_LIMIT, SolveStatus.INTERRUPTED, SolveStatus.FAILED]
)
def test_what_is_not_finished_has_an_honest_gap(rng, monkeypatch, status):
    problem = eight_experts(rng)
    truth = get_solver("exact").solve(problem).value
    replaced(monkeypatch, lambda _: MilpResult(status=status))
    solution = IlpSolver().solve(problem, ONE)
    assert solution.status is status
    done, *others = solution.stages
    assert done.status is SolveStatus.OPTIMAL
    assert done.gap < 1e-5
    for stage in others:
        assert stage.status is status
        assert 0 < stage.lower_bound < stage.value
    assert solution.lower_bound <= truth <= solution.value


def test_cbcs_bound_counts_where_it_had_no_time_to_finish(rng, monkeypatch):
    """90 units of the 100 that the start takes: more than counting proves."""
    problem = eight_experts(rng, wire=Wire.DEDUP)
    late = MilpResult(status=SolveStatus.TIME_LIMIT, bound=50.0)
    replaced(monkeypatch, lambda _: MilpResult(status=SolveStatus.TIME_LIMIT))
    counted = IlpSolver().solve(problem, ONE)
    monkeypatch.undo()
    replaced(monkeypatch, lambda _: late)
    solution = IlpSolver().solve(problem, ONE)
    assert solution.lower_bound >= counted.lower_bound
    for stage in solution.stages[1:]:
        assert stage.lower_bound >= 0.5 * stage.value


def test_ctrl_c_while_programs_are_built_keeps_the_start(rng, monkeypatch):
    problem = eight_experts(rng)

    def stop(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(ilp, "layer_program", stop)
    solution = IlpSolver().solve(problem, ONE)
    assert solution.status is SolveStatus.INTERRUPTED
    assert len(solution.stages) == 3
    quick = min(map(problem.objective_value, quick_placements(problem)))
    assert solution.value == quick
    assert 0 < solution.lower_bound < quick


def test_ctrl_c_while_cbc_runs_keeps_what_is_proven(rng):
    """Pressed when the first program has ended; the next one is at work then."""
    problem = eight_experts(rng)
    truth = get_solver("exact").solve(problem).value

    def press(event):
        if event.done:
            raise KeyboardInterrupt

    solution = IlpSolver().solve(problem, ONE, progress=press)
    assert solution.status is SolveStatus.INTERRUPTED
    assert [stage.status for stage in solution.stages] == [
        SolveStatus.OPTIMAL,
        SolveStatus.INTERRUPTED,
        SolveStatus.INTERRUPTED,
    ]
    assert solution.stages[0].gap < 1e-5
    assert all(0 < stage.lower_bound < stage.value for stage in solution.stages[1:])
    assert solution.lower_bound <= truth <= solution.value


def test_without_time_nothing_is_built(rng, monkeypatch):
    problem = eight_experts(rng)
    monkeypatch.setattr(ilp, "layer_program", lambda *_: pytest.fail("built"))
    solution = IlpSolver().solve(problem, SolverOptions(time_limit=1e-9, threads=1))
    assert solution.status is SolveStatus.TIME_LIMIT
    assert {stage.status for stage in solution.stages} == {SolveStatus.TIME_LIMIT}
    assert 0 < solution.lower_bound < solution.value


def test_spare_slots_might_hold_replicas_so_the_proof_is_about_less(rng):
    topology = Topology(num_ranks=2, ranks_per_node=2)
    problem = timed(random_problem(rng, 2, 4, topology, slots_per_rank=3))
    truth = oracle(problem).value
    solution = IlpSolver().solve(problem, ONE)
    assert (solution.lower_bound, solution.status) == (None, SolveStatus.HEURISTIC)
    for stage in solution.stages:
        assert stage.status is SolveStatus.OPTIMAL
    bound = sum(stage.lower_bound for stage in solution.stages)
    assert bound <= truth * (1 + 1e-9)
    assert solution.value == pytest.approx(truth, rel=1e-6)


def test_what_it_has_no_program_for_is_refused(rng):
    trace = make_trace(random_ids(rng, 50, 2, 4, 2), 4, ranked=True)
    wide = make_trace(random_ids(rng, 20, 1, 64, 2), 64)
    topology = Topology(num_ranks=2, ranks_per_node=2)
    counted = CountTrace(
        counts=np.ones((2, 2, 4), np.int64),
        num_tokens=np.full(2, 2),
        layer_ids=np.arange(2, dtype=np.int32),
    )
    for traces, cost, options, message in (
        ((trace,), {"homes": Homes.FOLLOW}, {}, "follow couples the layers"),
        ((trace, trace), {}, {"worst_case": True}, "worst of several traces"),
        ((counted,), {"wire": Wire.ALLGATHER}, {}, "only counted loads"),
        ((wide,), {}, {}, "at most 62 experts, got 64"),
    ):
        workload = Workload(traces=traces, cost=replace(TOY_COST, **cost), **options)
        problem = PlacementProblem.from_workload(workload, topology)
        with pytest.raises(SolverError, match=message):
            IlpSolver().solve(problem)
    problem = PlacementProblem.from_workload(
        Workload(traces=(trace,), cost=TOY_COST), topology, slots_per_rank=3
    )
    copied = random_placement(rng, trace, topology, extra_slots=1)
    slots = copied.slot_experts.copy()
    slots[0] = [0, 1, 2, 0, 2, 3]
    copied = replace(copied, slot_experts=slots)
    with pytest.raises(SolverError, match="warm_start holds replicas"):
        IlpSolver().solve(problem, warm_start=copied)


@pytest.mark.parametrize("visits", [0, 1.5])
def test_senseless_options_are_refused(visits):
    with pytest.raises(SolverError, match="max_visits must be a whole number >= 1"):
        IlpConfig(max_visits=visits)
