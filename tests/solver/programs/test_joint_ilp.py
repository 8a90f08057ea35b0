"""One program for all layers: CBC, HiGHS, dynamic programming and the oracle agree."""

from dataclasses import replace

import numpy as np
import pytest
from moetuner.errors import SolverError
from moetuner.placement.topology import Topology
from moetuner.problem import Objective, PlacementProblem
from moetuner.solver import SolverOptions, SolveStatus, get_solver
from moetuner.solver.base import Clock
from moetuner.solver.programs.joint_ilp import (
    Backend,
    JointIlpConfig,
    JointIlpSolver,
    kept_bounds,
)
from moetuner.trace.statistics import RoutingStatistics
from zipf_trace import zipf_trace

BACKENDS = [JointIlpSolver(config=JointIlpConfig(backend=b)) for b in Backend]
FOUR = Topology(num_ranks=4, ranks_per_node=4)


def traffic_problem(num_layers, num_experts, topology, seed=0, **options):
    trace = zipf_trace(
        num_tokens=3000,
        num_layers=num_layers,
        num_experts=num_experts,
        top_k=2,
        skew=0.6,
        affinity=0.4,
        seed=seed,
    )
    return PlacementProblem(
        statistics=RoutingStatistics.from_trace(trace),
        topology=topology,
        objective=Objective.TOTAL_TRAFFIC,
        **options,
    )


@pytest.mark.parametrize("seed", range(2))
@pytest.mark.parametrize("solver", BACKENDS, ids=[b.value for b in Backend])
def test_both_backends_prove_the_optimum_of_three_layers_of_eight(solver, seed):
    problem = traffic_problem(3, 8, FOUR, seed)
    truth = get_solver("exact").solve(problem)
    assert truth.status is SolveStatus.OPTIMAL
    solution = solver.solve(problem, SolverOptions(time_limit=120, threads=1))
    assert solution.status is SolveStatus.OPTIMAL
    assert solution.value == pytest.approx(truth.value, abs=1e-9)
    assert solution.lower_bound == pytest.approx(truth.value, abs=1e-4)


@pytest.mark.parametrize("solver", BACKENDS, ids=[b.value for b in Backend])
@pytest.mark.parametrize(
    "sizes",
    [
        {"slots_per_rank": 3},
        {"equal_slots": False},
        {"equal_slots": False, "memory_slack": 1},
    ],
    ids=["spare", "free", "memory"],
)
def test_other_sizes_agree_with_the_oracle(solver, sizes):
    problem = traffic_problem(2, 5, Topology(num_ranks=2, ranks_per_node=2), **sizes)
    truth = get_solver("oracle").solve(problem)
    solution = solver.solve(problem, SolverOptions(time_limit=60, threads=1))
    assert solution.value == pytest.approx(truth.value, abs=1e-9)
    assert solution.lower_bound <= truth.value + 1e-9


def test_what_it_does_not_finish_has_an_honest_gap():
    """A second is little for eight layers of eight experts; the optimum is known."""
    problem = traffic_problem(8, 8, FOUR)
    truth = get_solver("exact").solve(problem).value
    solution = JointIlpSolver().solve(problem, SolverOptions(time_limit=1, threads=1))
    finished = solution.status is SolveStatus.OPTIMAL
    assert finished or solution.status is SolveStatus.TIME_LIMIT
    assert solution.lower_bound <= truth <= solution.value + 1e-12
    assert solution.gap < (1e-4 if finished else 0.5)


def test_the_rows_that_are_fed_in_cut_off_no_optimum():
    problem = traffic_problem(3, 8, FOUR)
    flows = problem.statistics.transitions.astype(float)
    kept = kept_bounds(problem, flows, Clock(time_limit=60))
    best = get_solver("exact").solve(problem).placement.rank_of()
    same = best[:-1, :, None] == best[1:, None, :]
    by_pair = (flows * same).sum(axis=(1, 2))
    assert (by_pair <= kept).all()
    assert (kept < flows.sum(axis=(1, 2))).all()


def test_large_programs_are_refused():
    problem = traffic_problem(2, 64, Topology(num_ranks=64, ranks_per_node=8))
    with pytest.raises(SolverError, match="262144 products of placements, at most"):
        JointIlpSolver().solve(problem)


def test_no_flow_is_no_traffic():
    problem = traffic_problem(2, 4, Topology(num_ranks=2, ranks_per_node=2))
    idle = replace(
        problem.statistics, transitions=np.zeros_like(problem.statistics.transitions)
    )
    solution = JointIlpSolver().solve(replace(problem, statistics=idle))
    assert (solution.value, solution.status) == (0.0, SolveStatus.OPTIMAL)
