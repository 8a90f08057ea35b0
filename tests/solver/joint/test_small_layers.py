"""The last stage of joint where homes do not stay uniform and placements are few."""

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from joint_problems import NOTHING_MORE, modelled, problems
from moetuner.evaluation.cost import Homes
from moetuner.placement.topology import Topology
from moetuner.solver import SolverOptions, SolveStatus, get_solver
from moetuner.solver.base import Clock, place
from moetuner.solver.exact import exact
from moetuner.solver.exact.partitions import legal_layers
from moetuner.solver.joint.incumbent import Incumbent
from moetuner.solver.joint.profiles import Favour
from moetuner.solver.joint.small_layers import try_all
from moetuner.solver.joint.solver import JointConfig, JointSolver
from oracle import oracle
from strategies import examples, random_placement, random_problem

NESTED = [Topology(num_ranks=g, ranks_per_node=m) for g, m in [(4, 2), (6, 3)]]
GO = np.zeros(1, np.int32)
TRACE_ALONE = JointSolver(config=JointConfig(favour=Favour.TRACE))


@examples(7)
@given(
    problems(
        max_experts=6,
        homes=(Homes.FOLLOW, Homes.RECORDED),
        topologies=NESTED,
        num_layers=1,
    )
)
def test_one_layer_of_few_placements_is_optimal(case):
    """Through gateways the search alone ended up to 13 % above the optimum."""
    problem, _ = case
    if (states := legal_layers(problem)) is None or len(states) > 2000:
        return
    solver = JointSolver(config=JointConfig(rounds=2))
    solution = solver.solve(problem, SolverOptions(time_limit=600, threads=1))
    truth = oracle(problem).value
    if solution.placement.has_replicas:  # the oracle knows none
        assert solution.stages[-1].name != "small layers"
        return
    assert solution.value == pytest.approx(truth, rel=1e-9)
    assert solution.stages[-1].name == "small layers"


@pytest.mark.parametrize(("experts", "ranks", "per_node"), [(8, 4, 2), (10, 5, 5)])
def test_few_experts_with_uniform_homes_are_proven(rng, experts, ranks, per_node):
    """By dynamic programming, and by programs of whole layers."""
    topology = Topology(num_ranks=ranks, ranks_per_node=per_node)
    problem = modelled(random_problem(rng, 2, experts, topology))
    truth = get_solver("exact").solve(problem).value
    options = SolverOptions(time_limit=60, threads=1)
    solution = TRACE_ALONE.solve(problem, options)
    assert solution.status is SolveStatus.OPTIMAL
    assert solution.value == pytest.approx(truth, rel=1e-6)
    assert solution.lower_bound == pytest.approx(truth, rel=1e-6)
    assert solution.stages[-1].name == "small layers"
    assert solution.stages[-1].lower_bound == solution.lower_bound


def test_ranks_of_different_speed_are_proven_by_programs(rng):
    topology = Topology(num_ranks=3, ranks_per_node=3)
    problem = modelled(random_problem(rng, 1, 6, topology))
    cost = replace(problem.workload.cost, rank_speeds=(1.0, 0.5, 0.7))
    problem = replace(problem, workload=replace(problem.workload, cost=cost))
    solution = TRACE_ALONE.solve(problem, SolverOptions(time_limit=30, threads=1))
    truth = oracle(problem).value
    assert solution.status is SolveStatus.OPTIMAL
    assert solution.value == pytest.approx(truth, rel=1e-6)


@pytest.mark.parametrize(
    ("config", "options"),
    [
        ({"rounds": 1}, {}),
        ({"profile": NOTHING_MORE}, {}),
        ({"favour": Favour.TIME}, {}),
        ({"favour": Favour.FEW_RANKS}, {}),
    ],
    ids=["rounds", "profile", "time", "few-ranks"],
)
def test_what_asks_for_more_than_time_is_left_to_the_search(rng, config, options):
    problem = modelled(random_problem(rng, 1, 8, NESTED[0], **options))
    solver = JointSolver(config=JointConfig(**{"favour": Favour.TRACE, **config}))
    solution = solver.solve(problem, SolverOptions(time_limit=1, threads=1))
    assert "small layers" not in [stage.name for stage in solution.stages]


def test_ctrl_c_in_the_last_stage_is_told(rng, monkeypatch):
    problem = modelled(random_problem(rng, 1, 8, NESTED[0]))

    def stop(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(exact._Search, "best", stop)
    solution = TRACE_ALONE.solve(problem, SolverOptions(time_limit=5, threads=1))
    assert solution.status is SolveStatus.INTERRUPTED
    problem.check(solution.placement)


def nested(rng, **options):
    problem = modelled(random_problem(rng, 2, 4, NESTED[0], **options))
    start = random_placement(rng, problem.workload.traces[0], NESTED[0])
    incumbent = Incumbent(problem=problem)
    incumbent.offer(start)
    return incumbent


def test_layers_are_tried_until_none_is_better(rng):
    incumbent = nested(rng)
    assert try_all(incumbent, Clock(time_limit=60), GO)
    value = incumbent.value
    rank_of = incumbent.placement.rank_of()
    for layer in range(2):
        for state in legal_layers(incumbent.problem):
            other = rank_of.copy()
            other[layer] = state
            placement = place(incumbent.problem, other)
            assert incumbent.problem.objective_value(placement) >= value


@pytest.mark.parametrize(("seconds", "stop"), [(1e-9, 0), (60, 1)])
def test_time_and_ctrl_c_end_it_at_once(rng, seconds, stop):
    incumbent = nested(rng)
    value = incumbent.value
    flag = np.full(1, stop, np.int32)
    assert try_all(incumbent, Clock(time_limit=seconds), flag)
    assert incumbent.value == value


def test_many_placements_and_replicas_are_left_alone(rng):
    eight = modelled(random_problem(rng, 1, 8, NESTED[0]))
    incumbent = Incumbent(problem=eight)
    incumbent.offer(place(eight, np.arange(8, dtype=np.int32)[None] // 2))
    assert len(legal_layers(eight)) == 2520
    assert not try_all(incumbent, Clock(time_limit=60), GO)
    assert legal_layers(modelled(random_problem(rng, 1, 16, NESTED[0]))) is None
    copied = nested(rng, slots_per_rank=2)
    trace = copied.problem.workload.traces[0]
    for _ in range(20):
        more = random_placement(rng, trace, NESTED[0], extra_slots=1)
        if more.has_replicas:
            break
    copied.placement = more
    assert not try_all(copied, Clock(time_limit=60), GO)


@pytest.mark.parametrize(
    ("favour", "homes", "tried"),
    [
        (Favour.TIME, Homes.UNIFORM, False),
        (Favour.FEW_RANKS, Homes.FOLLOW, False),
        (Favour.TIME, Homes.FOLLOW, True),
    ],
)
def test_few_copies_and_uniform_homes_ask_for_no_such_stage(rng, favour, homes, tried):
    problem = modelled(random_problem(rng, 1, 4, NESTED[0]))
    cost = replace(problem.workload.cost, homes=homes)
    problem = replace(problem, workload=replace(problem.workload, cost=cost))
    solver = JointSolver(config=JointConfig(favour=favour, rounds=1))
    stages = [stage.name for stage in solver.solve(problem).stages]
    assert ("small layers" in stages) == tried


def test_without_cbc_what_the_search_found_stands(rng, tmp_path, monkeypatch):
    (tmp_path / "mip.py").write_text("raise ImportError('no CBC here')")
    monkeypatch.syspath_prepend(tmp_path)
    topology = Topology(num_ranks=5, ranks_per_node=5)
    problem = modelled(random_problem(rng, 2, 10, topology))
    solution = TRACE_ALONE.solve(problem, SolverOptions(time_limit=60, threads=1))
    assert solution.status is SolveStatus.HEURISTIC
    assert solution.value == problem.objective_value(solution.placement)
