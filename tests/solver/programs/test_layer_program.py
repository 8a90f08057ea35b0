"""One layer's program: the evaluator's time, and the optimum of all placements."""

import itertools
from dataclasses import replace

import numpy as np
import pytest
from moetuner.evaluation.cost import Homes, Wire
from moetuner.evaluation.workload import Workload
from moetuner.placement.topology import Topology
from moetuner.problem import PlacementProblem
from moetuner.solver import SolveStatus
from moetuner.solver.base import place
from moetuner.solver.exact.partitions import legal_layers
from moetuner.solver.programs.cbc import solve_milps
from moetuner.solver.programs.layer import (
    UNITS,
    count_visits,
    layer_program,
)
from moetuner.solver.programs.layer_tokens import LayerTokens
from oracle import MAX_STATES, oracle
from strategies import TOY_COST, make_trace, measured, random_ids, with_others

TOPOLOGIES = [(2, 1), (2, 2), (4, 2), (4, 4), (6, 3), (6, 1)]
NO_LATENCY = replace(TOY_COST.hardware, rank_latency=0.0, node_latency=0.0)


def random_layer(rng, wire, homes, shape, alike, most=9):
    """A problem of one layer, and ranks [E] of its experts."""
    num_ranks, per_node = shape
    num_experts = int(rng.integers(num_ranks, most + 1))
    num_tokens = int(rng.choice([0, 1, 40, 150]))
    ids = random_ids(rng, num_tokens, 1, num_experts, min(3, num_experts), 0.1, 2.0)
    trace = make_trace(
        ids,
        num_experts,
        sequence=np.arange(num_tokens, dtype=np.int32) // 7,
        home_rank=rng.integers(0, num_ranks, num_tokens).astype(np.int16),
    )
    hardware = TOY_COST.hardware if homes is Homes.UNIFORM else NO_LATENCY
    if not alike and rng.random() < 0.5:
        hardware = with_others(measured(hardware), rng.uniform(0.5, 3))
    hardware = replace(hardware, compute_floor=rng.choice([0.0, 2e-9, 1e-7]).item())
    cost = replace(
        TOY_COST,
        hardware=hardware,
        wire=wire,
        homes=homes,
        rank_speeds=() if alike else tuple(rng.uniform(0.5, 1, num_ranks)),
    )
    problem = PlacementProblem.from_workload(
        Workload(traces=(trace,), cost=cost, batch_tokens=int(rng.choice([0, 30, 70]))),
        Topology(num_ranks=num_ranks, ranks_per_node=per_node),
        slots_per_rank=-(-num_experts // num_ranks) + int(rng.integers(0, 2)),
    )
    slots = np.repeat(np.arange(num_ranks, dtype=np.int32), problem.slots_per_rank)
    return problem, rng.permutation(slots)[:num_experts]


def seconds_of(problem, rank_of):
    return problem.objective_value(place(problem, rank_of[None]))


def program_of(problem, rank_of):
    tokens = LayerTokens.of(problem, 0)
    return layer_program(problem, tokens, rank_of, seconds_of(problem, rank_of))


@pytest.mark.parametrize("homes", [Homes.UNIFORM, Homes.RECORDED])
@pytest.mark.parametrize("wire", list(Wire))
def test_the_program_prices_a_placement_like_the_evaluator(rng, wire, homes):
    """Choices are fixed at the start, whose ranks may have been named anew."""
    cases, models = [], []
    for shape, alike, _ in itertools.product(TOPOLOGIES, (True, False), range(2)):
        problem, rank_of = random_layer(rng, wire, homes, shape, alike)
        program = program_of(problem, rank_of)
        model = program.model
        start = np.where(model.integer, model.start, 0)
        lower = np.where(model.integer, start, model.lower)
        upper = np.where(model.integer, start, model.upper)
        assert (model.lower <= lower).all()
        assert (upper <= model.upper).all()
        cases.append((program, seconds_of(problem, rank_of)))
        models.append(replace(model, lower=lower, upper=upper))
    results = solve_milps(models, time_limit=120, threads=1)
    for (program, wanted), model, result in zip(cases, models, results, strict=True):
        value = program.seconds(model.objective @ result.x)
        assert value == pytest.approx(wanted, rel=1e-6, abs=1e-15)


@pytest.mark.parametrize("homes", [Homes.UNIFORM, Homes.RECORDED])
@pytest.mark.parametrize("wire", list(Wire))
def test_the_optimum_is_that_of_trying_all(rng, wire, homes):
    cases = []
    for shape, alike in itertools.product(TOPOLOGIES, (True, False)):
        problem, rank_of = random_layer(rng, wire, homes, shape, alike, most=6)
        program = program_of(problem, rank_of)
        states = legal_layers(problem)
        if states is not None and len(states) <= MAX_STATES:
            cases.append((problem, program))
    assert len(cases) >= 6
    models = [program.model for _, program in cases]
    results = solve_milps(models, time_limit=120, threads=1)
    for (problem, program), result in zip(cases, results, strict=True):
        assert result.status is SolveStatus.OPTIMAL
        best = oracle(problem).value
        found = seconds_of(problem, program.read(result.x))
        assert found == pytest.approx(best, rel=1e-6, abs=1e-15)
        assert program.seconds(result.bound) <= best * (1 + 1e-9) + 1e-15
        assert program.seconds(result.bound) >= best * (1 - 1e-5) - 1e-15


def test_its_unit_is_the_layers_time(rng):
    problem, rank_of = random_layer(rng, Wire.DEDUP, Homes.RECORDED, (4, 2), True)
    program = program_of(problem, rank_of)
    value = seconds_of(problem, rank_of)
    assert program.unit * UNITS == pytest.approx(max(value, 1e-9))


def test_what_is_not_legal_is_not_read(rng):
    problem, _ = random_layer(rng, Wire.DEDUP, Homes.UNIFORM, (2, 2), True)
    problem = replace(problem, slots_per_rank=-(-problem.num_experts // 2))
    rank_of = np.arange(problem.num_experts, dtype=np.int32) % 2
    program = program_of(problem, rank_of)
    x = np.zeros(program.model.num_columns)
    assert program.read(x) is None  # an expert is nowhere
    x[0 : 2 * problem.num_experts : 2] = 1.0
    assert program.read(x) is None  # all of them are on rank 0


def test_the_size_counts_sets_and_choices():
    """Sets {0, 1} and {1, 2, 3} and 4 experts, 2 ranks; one expert alone adds none."""
    ids = np.array([[[0, 1, -1]], [[1, 0, -1]], [[1, 2, 3]], [[2, -1, -1]]], np.int16)
    problem = PlacementProblem.from_workload(
        Workload(traces=(make_trace(ids, 4),), cost=TOY_COST),
        Topology(num_ranks=2, ranks_per_node=2),
    )
    assert count_visits(problem, LayerTokens.of(problem, 0)) == (2 + 4) * 2
