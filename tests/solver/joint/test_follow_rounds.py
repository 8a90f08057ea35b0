"""The search of layers together, where homes follow."""

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from joint_problems import NOTHING_MORE, anneal, problems, rounds_of
from moetuner.evaluation.cost import Homes, Wire
from moetuner.evaluation.workload import Workload, price, tally_batches
from moetuner.placement.topology import Topology
from moetuner.problem import PlacementProblem
from moetuner.solver import SolverOptions, get_solver
from moetuner.solver.base import place
from moetuner.solver.heuristics.starts import start_ranks
from moetuner.solver.joint.config import JointConfig
from moetuner.solver.joint.follow import FollowRounds
from moetuner.solver.joint.interruptible import Interruptible
from moetuner.solver.joint.scenarios import members
from strategies import TOY_COST, make_trace


def follow_of(problem, profile=NOTHING_MORE, known=None):
    return FollowRounds(
        problem=problem,
        options=SolverOptions(threads=2),
        profile=profile,
        runner=Interruptible(),
        layered=start_ranks(problem)[0],
        known=known,
    )


def dedup(problem):
    """With links of one speed, too."""
    hardware = TOY_COST.hardware
    cost = replace(problem.workload.cost, wire=Wire.DEDUP, hardware=hardware)
    return replace(problem, workload=replace(problem.workload, cost=cost))


@given(problems(homes=(Homes.FOLLOW,), num_layers=4), st.sampled_from([0.0, 2.0]))
def test_moves_of_layers_together_add_up(case, weight):
    """Padding too, over which a token goes on from where the layer before left it."""
    problem = dedup(case[0])
    profile = replace(NOTHING_MORE, peak=weight, pooled=weight, rank_copies=weight)
    rounds = follow_of(problem, profile)
    start = members(problem, rounds.layered)
    found, cost = anneal(rounds, start, 200)
    _, fresh = anneal(rounds, found, 0)
    assert cost == pytest.approx(fresh, rel=1e-9)
    for slots in (start, found):  # the same experts and empty slots on every rank
        assert (np.sort(slots) == np.sort(start)).all()


@given(problems(homes=(Homes.FOLLOW, Homes.RECORDED)))
def test_layers_with_homes_cost_what_their_links_carry(case):
    """On one node the search prices loads exactly, links by what each rank receives."""
    problem = dedup(case[0])
    num_ranks = problem.topology.num_ranks
    one_node = Topology(num_ranks=num_ranks, ranks_per_node=num_ranks)
    problem = replace(problem, topology=one_node)
    follow = problem.workload.cost.homes is Homes.FOLLOW
    rounds = follow_of(problem) if follow else rounds_of(problem, NOTHING_MORE)
    _, cost = anneal(rounds, members(problem, start_ranks(problem)[0]), 0)
    (trace,), (batches,) = problem.workload.traces, problem.workload.batches
    model = problem.workload.cost
    placement = place(problem, start_ranks(problem)[0])
    homes = np.arange(trace.num_tokens) % num_ranks
    if not follow:
        homes = trace.home_rank.astype(int)
    rank_of = placement.rank_of()
    wanted = np.zeros(problem.num_layers)
    row = model.shape.hidden_size / model.hardware.rank_bandwidth
    for layer in range(problem.num_layers):
        ids = trace.topk_ids[:, layer].astype(int)
        ranks = np.where(ids >= 0, rank_of[layer][ids], -1)
        ends = np.where(follow & (ranks[:, 0] >= 0), ranks[:, 0], homes)
        back = ranks[:, 0] if follow else homes  # who chose nobody first ends nowhere
        sizes = model.shape.dispatch_bytes, model.shape.combine_bytes
        for batch in range(batches.max() + 1):
            received = np.zeros(num_ranks)
            for place_, size in zip((homes, back), sizes, strict=True):
                for rank in range(num_ranks):
                    there = (ranks == rank).any(axis=1) & (place_ != rank)
                    received[rank] += size * (there & (batches == batch)).sum()
            seconds = received.max() * row
            latency = 2 * model.hardware.rank_latency * (seconds > 0)
            wanted[layer] += (seconds + latency) / (batches.max() + 1)
        homes = ends
    computing = price(tally_batches(trace, placement, model, batches), model).compute
    wanted += computing.mean(axis=0) if computing.ndim == 2 else computing
    assert cost == pytest.approx(wanted, rel=1e-6)


@given(problems(homes=(Homes.FOLLOW,)))
def test_lining_up_layers_keeps_clusters_and_nodes(case):
    problem = dedup(case[0])
    start = start_ranks(problem)[0]
    per_node = problem.topology.ranks_per_node
    aligned = follow_of(problem).align(start, per_node)
    for before, after in zip(start, aligned, strict=True):
        for unit in (1, per_node):
            pairs = np.unique(np.stack([before // unit, after // unit]), axis=1)
            assert np.unique(pairs[0]).size == pairs.shape[1]


@given(problems(homes=(Homes.FOLLOW,), num_layers=4))
def test_rounds_begin_at_what_is_known_where_it_is_better(case):
    """Before any round the best start is held, at its own cost."""
    problem = dedup(case[0])
    plain = follow_of(problem)
    _, cost = anneal(plain, members(problem, plain.rank_of), 0)
    assert plain.cost == pytest.approx(cost.sum(), rel=1e-9)
    better, cost = anneal(plain, members(problem, plain.rank_of), 500)
    known = better[:, : problem.num_experts]
    rounds = follow_of(problem, known=known)
    assert rounds.cost == pytest.approx(min(plain.cost, cost.sum()), rel=1e-9)
    if cost.sum() < plain.cost * (1 - 1e-9):
        assert (rounds.rank_of == known).all()
    worse = follow_of(problem, known=start_ranks(problem)[0])
    assert worse.cost <= plain.cost * (1 + 1e-9)


def test_a_start_with_a_replica_in_a_slot_that_is_left_over_is_no_error(rng):
    """Ten experts on four ranks: two slots of a layer are nobody's."""
    other = rng.integers(1, 10, (300, 3))
    ids = np.stack([other, np.zeros_like(other)], axis=2).astype(np.int16)
    trace = make_trace(
        ids, 10, ranked=True, sequence=np.arange(300, dtype=np.int32) // 10
    )
    hardware = replace(TOY_COST.hardware, memory_bandwidth=1e18, matmul_rate=1e7)
    cost = replace(TOY_COST, hardware=hardware, homes=Homes.FOLLOW)
    problem = PlacementProblem.from_workload(
        Workload(traces=(trace,), cost=cost), Topology(num_ranks=4, ranks_per_node=2)
    )
    slots = np.array([0, 1, 2, 0, 3, 4, 5, 6, 7, 8, 9, -1], np.int32)
    plain = place(problem, start_ranks(problem)[0])
    start = replace(plain, slot_experts=np.tile(slots, (3, 1)))
    config = JointConfig(profile=NOTHING_MORE, rounds=1)
    found = get_solver("joint", config).solve(
        problem, SolverOptions(time_limit=1000), warm_start=start
    )
    assert found.value <= problem.objective_value(start)
