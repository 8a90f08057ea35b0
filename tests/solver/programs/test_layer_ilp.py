"""One layer's program: the evaluator's time, and the optimum of every free set."""

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
from moetuner.solver.programs.cbc import solve_milps
from moetuner.solver.programs.layer import (
    MAX_FREE_EXPERTS,
    UNITS,
    count_visits,
    layer_program,
)
from moetuner.solver.programs.layer_tokens import LayerTokens
from strategies import TOY_COST, make_trace, random_ids

TOPOLOGIES = [(2, 1), (2, 2), (4, 2), (4, 4), (6, 3), (6, 1)]
NO_LATENCY = replace(TOY_COST.hardware, rank_latency=0.0, node_latency=0.0)


def random_layer(rng, wire, homes, shape, alike):
    """A problem of one layer, ranks [E] of its experts, and some ranks to free."""
    num_ranks, per_node = shape
    num_experts = int(rng.integers(num_ranks, 10))
    num_tokens = int(rng.choice([0, 1, 40, 150]))
    ids = random_ids(rng, num_tokens, 1, num_experts, min(3, num_experts), 0.1, 2.0)
    trace = make_trace(
        ids,
        num_experts,
        sequence=np.arange(num_tokens, dtype=np.int32) // 7,
        home_rank=rng.integers(0, num_ranks, num_tokens).astype(np.int16),
    )
    hardware = TOY_COST.hardware if homes is Homes.UNIFORM else NO_LATENCY
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
    rank_of = rng.permutation(slots)[:num_experts]
    count = int(rng.integers(1, num_ranks + 1))
    return problem, rank_of, np.sort(rng.permutation(num_ranks)[:count])


def seconds_of(problem, rank_of):
    return problem.objective_value(place(problem, rank_of[None]))


def program_of(problem, rank_of, ranks):
    tokens = LayerTokens.of(problem, 0)
    return layer_program(problem, tokens, rank_of, ranks, seconds_of(problem, rank_of))


@pytest.mark.parametrize("homes", [Homes.UNIFORM, Homes.RECORDED])
@pytest.mark.parametrize("wire", list(Wire))
def test_the_program_prices_a_placement_like_the_evaluator(rng, wire, homes):
    """Choices are fixed at the start, whose ranks may have been named anew."""
    cases, models = [], []
    for shape, alike, _ in itertools.product(TOPOLOGIES, (True, False), range(2)):
        problem, rank_of, ranks = random_layer(rng, wire, homes, shape, alike)
        program = program_of(problem, rank_of, ranks)
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
        problem, rank_of, ranks = random_layer(rng, wire, homes, shape, alike)
        program = program_of(problem, rank_of, ranks)
        if ranks.size**program.experts.size <= 3000:
            cases.append((problem, program))
    assert len(cases) >= 6
    models = [program.model for _, program in cases]
    results = solve_milps(models, time_limit=120, threads=1)
    for (problem, program), result in zip(cases, results, strict=True):
        assert result.status is SolveStatus.OPTIMAL
        best = np.inf
        for chosen in itertools.product(program.ranks, repeat=program.experts.size):
            rank_of = program.rank_of.copy()
            rank_of[program.experts] = chosen
            if np.bincount(rank_of).max() <= problem.slots_per_rank:
                best = min(best, seconds_of(problem, rank_of))
        found = seconds_of(problem, program.read(result.x))
        assert found == pytest.approx(best, rel=1e-6, abs=1e-15)
        assert program.seconds(result.bound) <= best * (1 + 1e-9) + 1e-15
        assert program.seconds(result.bound) >= best * (1 - 1e-5) - 1e-15


def test_its_unit_is_the_layers_time(rng):
    problem, rank_of, ranks = random_layer(
        rng, Wire.DEDUP, Homes.RECORDED, (4, 2), True
    )
    program = program_of(problem, rank_of, ranks)
    value = seconds_of(problem, rank_of)
    assert program.unit * UNITS == pytest.approx(max(value, 1e-9))


def test_what_is_not_legal_is_not_read(rng):
    problem, rank_of, _ = random_layer(rng, Wire.DEDUP, Homes.UNIFORM, (2, 2), True)
    problem = replace(problem, slots_per_rank=-(-problem.num_experts // 2))
    rank_of = np.arange(problem.num_experts, dtype=np.int32) % 2
    program = program_of(problem, rank_of, np.arange(2))
    x = np.zeros(program.model.num_columns)
    assert program.read(x) is None  # an expert is nowhere
    x[0 : 2 * problem.num_experts : 2] = 1.0
    assert program.read(x) is None  # all of them are on rank 0


def test_more_free_experts_than_a_mask_holds_are_too_many(rng):
    ids = random_ids(rng, 30, 1, 128, 4)
    problem = PlacementProblem.from_workload(
        Workload(traces=(make_trace(ids, 128),), cost=TOY_COST),
        Topology(num_ranks=4, ranks_per_node=4),
    )
    tokens = LayerTokens.of(problem, 0)
    rank_of = np.arange(128, dtype=np.int32) // 32
    few = count_visits(problem, tokens, rank_of, np.array([1]))
    assert 32 <= few < 1000
    assert MAX_FREE_EXPERTS < 64
    assert count_visits(problem, tokens, rank_of, np.array([1, 3])) > 2**60
