"""Plans for the slowest of several traces."""

from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np
import pytest
from moetuner.evaluation.evaluate import evaluate
from moetuner.evaluation.hardware import Hardware
from moetuner.evaluation.workload import Workload
from moetuner.placement.moves import fetched_copies
from moetuner.placement.topology import Topology
from moetuner.problem import PlacementProblem
from moetuner.solver import SolverOptions, SolveStatus
from moetuner.solver.heuristics.starts import quick_placements
from moetuner.solver.joint.solver import JointConfig, JointSolver
from moetuner.solver.joint.worst_case import solve_worst_case
from strategies import TOY_COST, make_trace, random_ids

if TYPE_CHECKING:
    from moetuner.evaluation.cost import CostModel


def two_domains(rng):
    """Traces that are busy with different experts; the second has more rows."""
    traces = []
    for first, tokens in ((0, 300), (6, 330)):
        ids = first + rng.permuted(np.tile(np.arange(6), (tokens, 1)), axis=1)[:, :2]
        stray = rng.integers(0, 12, (tokens, 1))
        ids = np.where(rng.random((tokens, 2)) < 0.1, stray, ids)
        ids[ids[:, 0] == ids[:, 1], 1] = -1
        traces.append(make_trace(ids[:, None].astype(np.int16), 12))
    return tuple(traces)


def problem_of(traces, **options):
    slow = replace(TOY_COST.hardware, matmul_rate=1e9, memory_bandwidth=1e15)
    cost: CostModel = replace(TOY_COST, hardware=slow)
    assert isinstance(slow, Hardware)
    workload = Workload(traces=traces, cost=cost, batch_tokens=0, **options)
    topology = Topology(num_ranks=3, ranks_per_node=3)
    return PlacementProblem.from_workload(workload, topology)


def test_the_slowest_trace_counts(rng):
    traces = two_domains(rng)
    worst = problem_of(traces, worst_case=True)
    solver = JointSolver(config=JointConfig(rounds=3))
    options = SolverOptions(threads=2)
    found = solver.solve(worst, options)
    alike = solver.solve(problem_of(traces), options)
    # Planned for the first trace alone, the second is slow.
    first = solver.solve(problem_of(traces[:1]), options)
    assert found.value == worst.objective_value(found.placement)
    assert found.value <= worst.objective_value(alike.placement)
    assert found.value < worst.objective_value(first.placement)
    again = solver.solve(worst, options)
    assert (
        again.placement.slot_experts.tolist() == found.placement.slot_experts.tolist()
    )


def test_bounds_of_weighted_means_hold_for_the_largest(rng):
    worst = problem_of(two_domains(rng), worst_case=True)
    solver = JointSolver(config=JointConfig(rounds=2))
    found = solver.solve(worst, SolverOptions(threads=2))
    assert found.lower_bound is not None
    assert 0 < found.lower_bound <= found.value


def random_problem(seed, top_k, topology):
    rng = np.random.default_rng(seed)
    traces = tuple(make_trace(random_ids(rng, 300, 3, 16, top_k), 16) for _ in "ab")
    workload = Workload(traces=traces, cost=TOY_COST, worst_case=True)
    return PlacementProblem.from_workload(workload, topology)


def test_moves_pay_in_the_slowest_trace_too():
    """A mean that moves make better may hide a trace that they make slower."""
    options = SolverOptions(threads=1)
    for seed in (0, 6, 8):
        problem = random_problem(seed, 2, Topology(num_ranks=4, ranks_per_node=2))
        stay = min(quick_placements(problem), key=problem.objective_value)
        now = problem.objective_value(stay)
        for each in (0.0, 0.003 * now):
            config = JointConfig(rounds=2, stay=stay, move_seconds=each)
            found = JointSolver(config=config).solve(problem, options)
            moved = fetched_copies(stay, found.placement).size
            assert found.value + each * moved <= now
            assert moved or each  # free moves are found


def test_few_copies_may_cost_time_in_the_slowest_trace():
    problem = random_problem(0, 3, Topology(num_ranks=4, ranks_per_node=4))
    quick = min(quick_placements(problem), key=problem.objective_value)
    config = JointConfig(favour="copies", copy_weight=4.0, rounds=3)
    options = SolverOptions(threads=1)
    found = JointSolver(config=config).solve(problem, options)
    copies, before = (
        sum(
            evaluate(trace, placement, TOY_COST).remote_ranks_per_token
            for trace in problem.workload.traces
        )
        for placement in (found.placement, quick)
    )
    assert copies < 0.95 * before
    assert found.value > problem.objective_value(quick)


class Pressed:
    """Ctrl-C after so many plans."""

    name = "joint"

    def __init__(self, plans):
        self.left = plans

    def solve(self, problem, options, **_):
        if not self.left:
            raise KeyboardInterrupt
        self.left -= 1
        return JointSolver(config=JointConfig(rounds=1)).solve(problem, options)


def test_what_was_found_before_ctrl_c_is_kept(rng):
    problem = problem_of(two_domains(rng), worst_case=True)
    asked = {"starts": [], "value_of": problem.objective_value}
    found = solve_worst_case(Pressed(1), problem, SolverOptions(), **asked)
    assert found.status is SolveStatus.INTERRUPTED
    assert found.value == problem.objective_value(found.placement)
    with pytest.raises(KeyboardInterrupt):
        solve_worst_case(Pressed(0), problem, SolverOptions(), **asked)
