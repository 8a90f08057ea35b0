"""What holds for every solver behind the protocol."""

from dataclasses import FrozenInstanceError, asdict, replace
from functools import cache

import numpy as np
import pytest
from hypothesis import given
from moetuner.errors import InvalidPlacementError, MissingStatisticsError, SolverError
from moetuner.placement.model import Placement
from moetuner.placement.topology import Topology
from moetuner.problem import Objective
from moetuner.solver import SOLVERS, SolverOptions, SolveStatus, get_solver
from moetuner.solver.base import Clock, finish, relative_gap
from moetuner.solver.joint.config import JointConfig
from oracle import oracle
from strategies import placement_problems, random_problem, rename_experts

TWO_NODES = Topology(num_ranks=4, ranks_per_node=2)
PATIENT = SolverOptions(time_limit=600, threads=2)  # all end by themselves
CASES = [
    pytest.param(name, objective, id=f"{name}-{objective.value}")
    for name in SOLVERS
    for objective in get_solver(name).objectives
]
SLOTS = [0, 3]


def solver_of(name):
    """The solver, with its work bounded by rounds where the clock would decide."""
    return get_solver(name, JointConfig(rounds=2) if name == "joint" else None)


def some_placement(problem, rng):
    row = np.arange(problem.num_experts) % problem.topology.num_ranks
    rank_of = rng.permuted(np.tile(row, (problem.num_layers, 1)), axis=1)
    return Placement.from_rank_of(
        rank_of, layer_ids=problem.statistics.layer_ids, topology=problem.topology
    )


@cache
def solved(objective, slots=0):
    """A problem for all solvers, its optimum, and the best of 40 random placements."""
    rng = np.random.default_rng([list(Objective).index(objective), slots])
    problem = random_problem(
        rng, 2, 5, TWO_NODES, objective=objective, slots_per_rank=slots
    )
    tried = [some_placement(problem, rng) for _ in range(40)]
    return problem, oracle(problem), min(tried, key=problem.objective_value)


@pytest.mark.parametrize("slots", SLOTS, ids=["few", "spare"])
@pytest.mark.parametrize(("name", "objective"), CASES)
def test_what_a_solution_claims_holds(name, objective, slots):
    problem, best, _ = solved(objective, slots)
    solution = solver_of(name).solve(problem, PATIENT)
    problem.check(solution.placement)
    assert solution.value == problem.objective_value(solution.placement)
    assert solution.objective is objective
    assert solution.lower_bound is None or solution.lower_bound <= solution.value
    assert solution.status in (SolveStatus.OPTIMAL, SolveStatus.HEURISTIC)
    provenance = solution.placement.provenance
    assert (provenance.solver, provenance.value) == (name, solution.value)
    truth = best.value
    if not solution.placement.has_replicas:  # the oracle knows none
        assert solution.value >= truth * (1 - 1e-9)
    if solution.lower_bound is not None:
        assert solution.lower_bound <= truth * (1 + 1e-9) + 1e-9


@pytest.mark.parametrize(("name", "objective"), CASES)
def test_never_worse_than_its_warm_start(name, objective):
    """The best of 40 random placements, and the optimum itself, as warm starts."""
    problem, best, lucky = solved(objective)
    for warm_start in (lucky, best.placement):
        solution = solver_of(name).solve(problem, PATIENT, warm_start=warm_start)
        assert solution.value <= problem.objective_value(warm_start)
        assert solution.value == problem.objective_value(solution.placement)


@pytest.mark.parametrize(("name", "objective"), CASES)
def test_one_seed_gives_one_placement(name, objective, rng):
    problem = random_problem(rng, 2, 5, TWO_NODES, objective=objective)
    once, again = (
        solver_of(name).solve(problem, replace(PATIENT, seed=7, threads=threads))
        for threads in (1, 2)
    )
    np.testing.assert_array_equal(once.placement.rank_of(), again.placement.rank_of())


@pytest.mark.parametrize(("name", "objective"), CASES)
def test_idle_layers_and_a_single_rank_are_legal(name, objective, rng):
    problem = random_problem(
        rng, 2, 4, Topology(num_ranks=1, ranks_per_node=1), objective=objective
    )
    counts = problem.statistics
    idle = replace(
        counts, load=counts.load * 0, transitions=np.zeros_like(counts.transitions)
    )
    for statistics in (counts, idle):
        asked = replace(problem, statistics=statistics)
        solution = solver_of(name).solve(asked, PATIENT)
        assert solution.value == asked.objective_value(solution.placement)


def test_the_seed_of_random_matters(rng):
    problem = random_problem(rng, 2, 8, TWO_NODES)
    rows = [
        get_solver("random").solve(problem, SolverOptions(seed=seed)).placement
        for seed in (1, 2)
    ]
    assert (rows[0].rank_of() != rows[1].rank_of()).any()


@pytest.mark.parametrize("name", SOLVERS)
def test_an_objective_that_it_does_not_minimise_is_refused(name, rng):
    solver = get_solver(name)
    for objective in set(Objective) - set(solver.objectives):
        problem = random_problem(rng, 2, 4, TWO_NODES, objective=objective)
        with pytest.raises(
            SolverError, match=f"{name} minimises .*asks for {objective.value}"
        ):
            solver.solve(problem)


@pytest.mark.parametrize("name", ["chain", "ilp2", "affinity", "exact"])
def test_traffic_without_transitions_is_refused_by_name(name, rng):
    problem = random_problem(rng, 2, 4, TWO_NODES, objective=Objective.LINK_TRAFFIC)
    counted = replace(problem.statistics, transitions=None)
    with pytest.raises(MissingStatisticsError, match=f"{name} needs layer-to-layer"):
        get_solver(name).solve(replace(problem, statistics=counted))


def test_a_warm_start_of_another_problem_is_refused(rng):
    problem = random_problem(rng, 2, 4, TWO_NODES)
    other = some_placement(random_problem(rng, 3, 4, TWO_NODES), rng)
    with pytest.raises(InvalidPlacementError, match="does not answer the problem"):
        get_solver("lpt").solve(problem, warm_start=other)


def test_options_of_another_solver_are_refused():
    config = JointConfig(rounds=2)
    assert get_solver("joint", config).config is config
    assert get_solver("joint").config == JointConfig()
    for name in ("ilp", "lpt"):
        with pytest.raises(SolverError, match=f"solver {name}: config must be of cl"):
            get_solver(name, config)


@pytest.mark.parametrize("name", SOLVERS)
def test_options_are_a_frozen_dataclass_that_defaults_make_again(name):
    solver = get_solver(name)
    config = solver.config
    assert type(config)(**asdict(config)) == config
    assert get_solver(name, config).config is config
    with pytest.raises(FrozenInstanceError):
        solver.config = None


def test_unknown_names_and_senseless_limits_are_refused():
    with pytest.raises(SolverError, match="unknown solver 'gurobi'; there are contig"):
        get_solver("gurobi")
    for limit in (0, -1, float("nan")):
        with pytest.raises(SolverError, match="time_limit must be > 0"):
            SolverOptions(time_limit=limit)
    for name in ("seed", "threads"):
        for value in (-1, 0.5):
            with pytest.raises(SolverError, match=f"{name} must be a whole number"):
                SolverOptions(**{name: value})


def test_a_bound_above_the_value_is_called_a_false_proof(rng):
    problem = random_problem(rng, 2, 4, TWO_NODES)
    rank_of = some_placement(problem, rng).rank_of()
    arguments = (get_solver("lpt"), problem, rank_of, Clock(time_limit=1))
    value = problem.objective_value(some_placement(problem, rng))
    with pytest.raises(SolverError, match=r"lpt: claimed bound .* exceeds the value"):
        finish(*arguments, status=SolveStatus.HEURISTIC, lower_bound=value * 99)


def test_a_gap_is_relative_to_the_value():
    assert relative_gap(4.0, 3.0) == 0.25
    assert relative_gap(0.0, 0.0) == 0.0
    assert relative_gap(4.0, None) is None


@given(placement_problems(shapes=((2, 1), (4, 2), (4, 4), (6, 3)), max_experts=9))
def test_relabelling_changes_no_value(case):
    """Experts by any permutation; nodes, and ranks inside nodes, by any other."""
    problem, rng = case
    statistics, topology = problem.statistics, problem.topology
    placement = some_placement(problem, rng)
    order = rng.permutation(problem.num_experts)
    ranks = np.arange(topology.num_ranks).reshape(topology.num_nodes, -1)
    ranks = rng.permuted(rng.permutation(ranks), axis=1).ravel()
    renamed = rename_experts(problem, order)
    moved = Placement.from_rank_of(
        ranks[placement.rank_of()[:, order]],
        layer_ids=statistics.layer_ids,
        topology=topology,
    )
    for objective in Objective:
        before = replace(problem, objective=objective)
        after = replace(renamed, objective=objective)
        assert after.objective_value(moved) == pytest.approx(
            before.objective_value(placement), rel=1e-12
        )
