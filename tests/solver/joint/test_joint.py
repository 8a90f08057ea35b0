"""The joint planner: its optimum, its limits, what interrupts it."""

import time
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from joint_problems import NOTHING_MORE, TOPOLOGIES, big_problem, modelled, problems
from moetuner.errors import InvalidProblemError, SolverError
from moetuner.evaluation.cost import Homes, Wire
from moetuner.evaluation.evaluate import evaluate
from moetuner.placement.topology import Topology
from moetuner.problem import Objective
from moetuner.solver import SolverOptions, SolveStatus
from moetuner.solver.base import Clock, finish, place
from moetuner.solver.heuristics.starts import quick_placements, start_ranks
from moetuner.solver.joint.interruptible import Interruptible
from moetuner.solver.joint.profiles import TIME_PROFILES, Favour, choose_profile
from moetuner.solver.joint.solver import JointConfig, JointSolver
from moetuner.solver.joint.tokens import TokenRounds
from oracle import oracle
from strategies import examples, random_problem


@examples(12)
@given(problems(max_experts=5, topologies=TOPOLOGIES[:4]))
def test_tiny_problems_are_solved_like_the_oracle_does(case):
    problem, _ = case
    solver = JointSolver(config=JointConfig(profile=NOTHING_MORE, rounds=3))
    solution = solver.solve(problem, SolverOptions(time_limit=600, threads=2))
    truth = oracle(problem).value
    assert solution.value == problem.objective_value(solution.placement)
    if not problem.wants_replicas:
        assert solution.value == pytest.approx(truth, rel=1e-9)
    elif solution.placement.has_replicas:  # the oracle knows none
        assert solution.value <= truth * (1 + 1e-9)
    else:  # rounds alone, without what finishes layers exactly, may miss a little
        assert truth * (1 - 1e-9) <= solution.value <= truth * 1.1


def test_rounds_and_seed_decide_whatever_the_threads(rng):
    problem = modelled(big_problem(rng))
    solver = JointSolver(config=JointConfig(rounds=3))
    rows = [
        solver.solve(
            problem, SolverOptions(seed=seed, threads=threads)
        ).placement.slot_experts.tolist()
        for seed, threads in ((5, 1), (5, 2), (6, 2))
    ]
    assert rows[0] == rows[1]
    assert rows[0] != rows[2]


def test_never_worse_than_the_quick_methods_and_better_than_them(rng):
    problem = modelled(big_problem(rng))
    solution = JointSolver(config=JointConfig(rounds=2)).solve(problem)
    starts = [problem.objective_value(place(problem, s)) for s in start_ranks(problem)]
    assert len(starts) == 3
    assert solution.value < min(starts)


@pytest.mark.parametrize("limit", [0.05, 0.5])
def test_the_time_limit_holds_and_is_used(rng, limit):
    problem = modelled(
        random_problem(rng, 24, 64, Topology(num_ranks=8, ranks_per_node=8))
    )
    solver = JointSolver(config=JointConfig(patience=1000))
    began = time.monotonic()
    solution = solver.solve(problem, SolverOptions(time_limit=limit))
    assert time.monotonic() - began < 60  # of the hours that its rounds would take
    assert solution.status is SolveStatus.TIME_LIMIT
    problem.check(solution.placement)


def test_a_slow_rank_is_given_less(rng):
    problem = modelled(random_problem(rng, 3, 16, TOPOLOGIES[3]))
    workload = problem.workload
    compute_bound = replace(
        workload.cost,
        hardware=replace(
            workload.cost.hardware, matmul_rate=1e10, memory_bandwidth=1e15
        ),
    )
    loads = []
    for speeds in ((1, 1, 1, 1), (0.25, 1, 1, 1)):
        cost = replace(compute_bound, rank_speeds=speeds)
        asked = replace(problem, workload=replace(workload, cost=cost))
        placement = JointSolver(config=JointConfig(rounds=2)).solve(asked)
        loads.append(asked.rank_loads(placement.placement.rank_of())[:, 0].mean())
    assert loads[1] < 0.6 * loads[0]


def test_trials_choose_a_profile_from_planning_data_alone(rng):
    problem = modelled(big_problem(rng))
    trace = problem.workload.traces[0]
    sequence = (np.arange(trace.num_tokens) // 10).astype(np.int32)
    workload = replace(
        problem.workload, traces=(replace(trace, sequence=sequence),), batch_tokens=100
    )
    options, runner = SolverOptions(seed=3), Interruptible()
    arguments = (options, runner, Clock(time_limit=60))
    for asked, seconds, expected in (
        (problem, 60.0, (TIME_PROFILES[0],)),  # no sequences
        (replace(problem, workload=workload), 60.0, TIME_PROFILES),
        (replace(problem, workload=workload), 1e-9, TIME_PROFILES[:1]),
    ):
        chosen = choose_profile(asked, *arguments, seconds)
        assert chosen in expected
        assert chosen == choose_profile(asked, *arguments, seconds)


@pytest.mark.parametrize("homes", [Homes.UNIFORM, Homes.FOLLOW])
def test_the_more_copies_count_the_fewer_there_are(rng, homes):
    problem = modelled(big_problem(rng))
    workload = replace(
        problem.workload,
        traces=(replace(problem.workload.traces[0], ranked=True),),
        cost=replace(problem.workload.cost, wire=Wire.DEDUP, homes=homes),
    )
    problem = replace(problem, workload=workload)
    copies, loads = [], []
    for weight in (0.1, 20.0):
        config = JointConfig(favour=Favour.FEW_RANKS, rank_weight=weight, rounds=3)
        placement = JointSolver(config=config).solve(problem).placement
        score = evaluate(workload.traces[0], placement, workload.cost)
        copies.append(score.remote_ranks_per_token)
        loads.append(score.imbalance_mean)
    assert copies[1] < 0.98 * copies[0]
    assert loads[1] > loads[0]


@pytest.mark.parametrize(
    "weight", [0, -1.0, 1e7, float("inf"), float("nan"), "1", True]
)
def test_a_weight_of_copies_is_a_positive_number(weight):
    with pytest.raises(SolverError, match="rank_weight must be > 0"):
        JointConfig(favour=Favour.FEW_RANKS, rank_weight=weight)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"favour": "speed"}, InvalidProblemError, "one of time, few-ranks, trace"),
        ({"move_seconds": -1}, SolverError, "move_seconds must be >= 0 s"),
        ({"move_seconds": float("nan")}, SolverError, "move_seconds must be >= 0 s"),
        ({"rounds": -1}, SolverError, "rounds must be a whole number >= 0"),
        ({"rounds": 1.5}, SolverError, "rounds must be a whole number >= 0"),
        ({"patience": 0}, SolverError, "patience must be a whole number >= 1"),
    ],
)
def test_senseless_options_are_refused(options, error, message):
    with pytest.raises(error, match=message):
        JointConfig(**options)


def test_the_bound_that_is_shown_holds_for_the_optimum(rng):
    problem = modelled(
        random_problem(rng, 2, 5, Topology(num_ranks=2, ranks_per_node=1))
    )
    told = []
    solver = JointSolver(config=JointConfig(rounds=2))
    solution = solver.solve(problem, progress=told.append)
    truth = oracle(problem).value
    assert 0 < solution.lower_bound <= truth <= solution.value
    assert {event.bound for event in told} == {solution.lower_bound}
    assert solution.stages[-1].value == solution.value
    hurried = solver.solve(problem, SolverOptions(time_limit=1))
    assert hurried.lower_bound is None


def test_ctrl_c_between_two_searches_keeps_what_was_found(rng, monkeypatch):
    def press(*_):
        raise KeyboardInterrupt

    topology = Topology(num_ranks=4, ranks_per_node=2)
    plain = random_problem(rng, 3, 16, topology, slots_per_rank=5)
    problem = replace(plain, objective=Objective.MODELLED_TIME)
    config = JointConfig(rounds=3, profile=NOTHING_MORE)
    monkeypatch.setattr("moetuner.solver.joint.run.filled", press)
    found = JointSolver(config=config).solve(problem)
    assert found.status is SolveStatus.INTERRUPTED
    assert [stage.name for stage in found.stages][-1] == "layers"
    assert found.value == problem.objective_value(found.placement)
    assert found.value < min(map(problem.objective_value, quick_placements(problem)))


def test_ctrl_c_while_the_last_value_is_told_keeps_the_placement(rng, monkeypatch):
    pressed = []

    def finish_or_press(*args, **options):
        if not pressed:
            pressed.append(True)
            raise KeyboardInterrupt
        return finish(*args, **options)

    problem = modelled(big_problem(rng))
    config = JointConfig(rounds=2, profile=NOTHING_MORE)
    monkeypatch.setattr("moetuner.solver.joint.solver.finish", finish_or_press)
    found = JointSolver(config=config).solve(problem)
    assert found.status is SolveStatus.INTERRUPTED
    assert found.value < min(map(problem.objective_value, quick_placements(problem)))


def test_replicas_are_never_worse_than_none(rng, monkeypatch):
    """Not even where the walk prefers what is only as good as the quick methods."""
    problem = modelled(big_problem(rng))
    roomy = replace(problem, slots_per_rank=problem.slots_per_rank + 1)
    quick = min(quick_placements(roomy), key=roomy.objective_value)

    def begin(walk, placements, clock):
        walk.placement, walk._least = quick, -np.inf

    monkeypatch.setattr(TokenRounds, "begin", begin)
    solver = JointSolver(config=JointConfig(rounds=2))
    found = solver.solve(roomy)
    layers, _, tokens = found.stages[-3:]
    assert (layers.name, tokens.name) == ("layers", "tokens")
    assert found.value <= layers.value < roomy.objective_value(quick)
