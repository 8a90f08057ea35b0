"""Large-neighbourhood search: proofs, starts, refusals, the clock, Ctrl-C."""

import time
from dataclasses import replace

import numpy as np
import pytest
from moetuner.errors import SolverError
from moetuner.evaluation.cost import Homes, Wire
from moetuner.evaluation.workload import Workload
from moetuner.placement.topology import Topology
from moetuner.problem import PlacementProblem
from moetuner.solver import (
    SolverOptions,
    SolveStatus,
    get_solver,
)
from moetuner.solver.base import place
from moetuner.solver.heuristics.starts import quick_placements
from moetuner.solver.programs import lns, neighbourhoods
from moetuner.solver.programs.lns import LnsConfig, LnsSolver
from moetuner.trace import CountTrace
from strategies import (
    TOY_COST,
    make_trace,
    random_ids,
    random_placement,
    random_problem,
)

ONE = SolverOptions(time_limit=60, threads=1)
SHORT = LnsSolver(config=LnsConfig(program_seconds=0.3))


def timed(problem, **changes):
    cost = replace(problem.workload.cost, **changes)
    workload = replace(problem.workload, cost=cost)
    return replace(problem, workload=workload, objective="modelled-time")


def eight_experts(rng, ranks, per_node, num_layers=3, **cost):
    topology = Topology(num_ranks=ranks, ranks_per_node=per_node)
    return timed(random_problem(rng, num_layers, 8, topology), **cost)


def large(rng, **cost):
    topology = Topology(num_ranks=8, ranks_per_node=4)
    return timed(random_problem(rng, 4, 32, topology), **cost)


@pytest.mark.parametrize("wire", list(Wire))
@pytest.mark.parametrize(("ranks", "per_node"), [(4, 4), (4, 2), (2, 1)])
def test_whole_layers_prove_what_dynamic_programming_proves(rng, ranks, per_node, wire):
    problem = eight_experts(rng, ranks, per_node, wire=wire)
    truth = get_solver("exact").solve(problem)
    told = []
    solution = LnsSolver().solve(problem, ONE, progress=told.append)
    assert solution.status is SolveStatus.OPTIMAL
    assert solution.value == pytest.approx(truth.value, rel=1e-6)
    assert solution.lower_bound <= truth.value * (1 + 1e-9)
    assert solution.lower_bound == pytest.approx(truth.value, rel=1e-6)
    assert told[-1].done == told[-1].total == problem.num_layers
    assert told[-1].bound == solution.lower_bound


def test_free_sizes_and_ranks_of_different_speed_agree_with_the_oracle(rng):
    topology = Topology(num_ranks=3, ranks_per_node=3)
    problem = timed(
        random_problem(rng, 2, 6, topology, equal_slots=False),
        rank_speeds=(1.0, 0.5, 0.7),
    )
    truth = get_solver("oracle").solve(problem).value
    solution = LnsSolver().solve(problem, ONE)
    assert solution.status is SolveStatus.OPTIMAL
    assert solution.value == pytest.approx(truth, rel=1e-6)


def test_spare_slots_might_hold_replicas_so_the_proof_is_about_less(rng):
    topology = Topology(num_ranks=2, ranks_per_node=2)
    problem = timed(random_problem(rng, 2, 4, topology, slots_per_rank=3))
    truth = get_solver("oracle").solve(problem).value
    solution = LnsSolver().solve(problem, ONE)
    assert (solution.lower_bound, solution.status) == (None, SolveStatus.HEURISTIC)
    (stage,) = solution.stages
    assert stage.status is SolveStatus.OPTIMAL
    assert stage.lower_bound <= truth * (1 + 1e-9)
    assert solution.value == pytest.approx(truth, rel=1e-6)


@pytest.mark.parametrize("homes", [Homes.UNIFORM, Homes.RECORDED])
def test_it_is_never_worse_than_its_start_and_better_where_it_can(rng, homes):
    problem = large(rng)
    (trace,) = problem.workload.traces
    home = rng.integers(0, 8, trace.num_tokens).astype(np.int16)
    trace = replace(trace, home_rank=home)
    workload = replace(problem.workload, traces=(trace,))
    problem = timed(replace(problem, workload=workload), homes=homes)
    quick = min(map(problem.objective_value, quick_placements(problem)))
    options = SolverOptions(time_limit=2, threads=1)
    solution = SHORT.solve(problem, options)
    assert solution.value == problem.objective_value(solution.placement)
    assert solution.value < 0.999 * quick
    assert solution.lower_bound is None  # no layer was freed as a whole
    start = random_placement(rng, trace, problem.topology)
    again = LnsSolver().solve(problem, options, warm_start=start)
    assert again.value < problem.objective_value(start)
    worse = LnsSolver().solve(
        problem,
        SolverOptions(time_limit=0.01, threads=1),
        warm_start=solution.placement,
    )
    assert worse.value == solution.value
    assert worse.status is SolveStatus.TIME_LIMIT


def test_layers_add_up_to_the_objective(rng):
    problem = large(rng)
    placement = random_placement(rng, problem.workload.traces[0], problem.topology)
    value = problem.objective_value(placement)
    assert problem.workload.layer_seconds(placement).sum() == pytest.approx(
        value, rel=1e-12
    )


def test_what_the_objective_does_not_confirm_is_not_taken(rng, monkeypatch):
    problem = eight_experts(rng, 4, 4)
    trace = problem.workload.traces[0]
    start = random_placement(rng, trace, problem.topology)
    value = problem.objective_value(start)
    asked = []

    def deny(self, placement):
        asked.append(placement)
        return value if len(asked) <= 2 else value * (1 + 1e-12)

    monkeypatch.setattr(PlacementProblem, "objective_value", deny)
    solution = LnsSolver().solve(problem, ONE, warm_start=start)
    assert len(asked) > 4  # there was something to deny
    assert (solution.placement.rank_of() == start.rank_of()).all()


def test_the_seed_decides_when_programs_end_by_themselves(rng, monkeypatch):
    monkeypatch.setattr(neighbourhoods, "WHOLE_VISITS", 1)
    problem = eight_experts(rng, 4, 2, num_layers=1)
    small = LnsSolver(config=LnsConfig(max_visits=24, program_seconds=60.0))
    courses = []
    for seed in (1, 1, 2):
        told = []
        options = SolverOptions(time_limit=300, threads=1, seed=seed)
        small.solve(problem, options, progress=told.append)
        courses.append([(event.done, event.incumbent) for event in told])
    assert len(courses[0]) > 3
    assert courses[0] == courses[1]
    assert courses[0] != courses[2]


def test_what_was_not_closed_in_time_gets_more_of_it(rng):
    problem = eight_experts(rng, 4, 2, num_layers=1)
    hasty = LnsSolver(config=LnsConfig(program_seconds=0.01))
    told = []
    solution = hasty.solve(problem, ONE, progress=told.append)
    assert told[0].done < told[0].total  # time was up for some at first
    assert solution.status is SolveStatus.OPTIMAL


def test_the_time_limit_holds(rng):
    problem = large(rng)
    began = time.monotonic()
    solution = LnsSolver().solve(problem, SolverOptions(time_limit=1.5, threads=1))
    assert time.monotonic() - began < 4
    assert solution.status is SolveStatus.TIME_LIMIT


@pytest.mark.parametrize("late", [False, True])
def test_an_interrupted_search_keeps_its_best(rng, monkeypatch, late):
    """Ctrl-C in a later lot, while CBC runs, or while programs are built."""
    problem = large(rng)
    real, calls = lns.solve_milps, []

    def stop(models, **options):
        calls.append(len(models))
        if len(calls) == 1:
            return real(models, **options)
        if late:
            raise KeyboardInterrupt
        results = real(models[:0], **options)
        interrupted = lns.MilpResult(status=SolveStatus.INTERRUPTED)
        return results + [interrupted] * len(models)

    monkeypatch.setattr(lns, "solve_milps", stop)
    solution = SHORT.solve(problem, ONE)
    assert len(calls) == 2
    assert solution.status is SolveStatus.INTERRUPTED
    quick = min(map(problem.objective_value, quick_placements(problem)))
    assert solution.value < quick


def test_what_it_has_no_program_for_is_refused(rng):
    trace = make_trace(random_ids(rng, 50, 2, 4, 2), 4, ranked=True)
    topology = Topology(num_ranks=2, ranks_per_node=2)
    counted = CountTrace(
        counts=np.ones((2, 2, 4), np.int64),
        num_tokens=np.full(2, 2),
        layer_ids=np.arange(2, dtype=np.int32),
    )
    for traces, cost, options, sizes, message in (
        ((trace,), {"homes": Homes.FOLLOW}, {}, {}, "follow couples the layers"),
        ((trace, trace), {}, {"worst_case": True}, {}, "worst of several traces"),
        ((counted,), {"wire": Wire.ALLGATHER}, {}, {}, "only counted loads"),
        ((trace,), {}, {}, {"equal_slots": False, "memory_slack": 1}, "memory row"),
    ):
        workload = Workload(traces=traces, cost=replace(TOY_COST, **cost), **options)
        problem = PlacementProblem.from_workload(workload, topology, **sizes)
        with pytest.raises(SolverError, match=message):
            LnsSolver().solve(problem)
    problem = PlacementProblem.from_workload(
        Workload(traces=(trace,), cost=TOY_COST), topology, slots_per_rank=3
    )
    copied = random_placement(rng, trace, topology, extra_slots=1)
    slots = copied.slot_experts.copy()
    slots[0] = [0, 1, 2, 0, 2, 3]
    copied = replace(copied, slot_experts=slots)
    with pytest.raises(SolverError, match="warm_start holds replicas"):
        LnsSolver().solve(problem, warm_start=copied)


def test_a_model_too_large_for_any_program_keeps_its_start(rng):
    problem = timed(
        random_problem(rng, 1, 256, Topology(num_ranks=4, ranks_per_node=4))
    )
    solution = LnsSolver().solve(problem, ONE)
    quick = min(map(problem.objective_value, quick_placements(problem)))
    assert (solution.value, solution.status) == (quick, SolveStatus.HEURISTIC)


def test_one_rank_leaves_nothing_to_choose(rng):
    problem = timed(random_problem(rng, 2, 4, Topology(num_ranks=1, ranks_per_node=1)))
    solution = LnsSolver().solve(problem, ONE)
    assert solution.value == problem.objective_value(
        place(problem, np.zeros((2, 4), np.int32))
    )


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"program_seconds": 0}, "program_seconds must be > 0 s"),
        ({"max_visits": 0}, "max_visits must be a whole number >= 1"),
        ({"max_visits": 1.5}, "max_visits must be a whole number >= 1"),
    ],
)
def test_senseless_options_are_refused(options, message):
    with pytest.raises(SolverError, match=message):
        LnsConfig(**options)
