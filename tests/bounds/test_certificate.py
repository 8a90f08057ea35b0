"""Bounds against the truth, and what they promise."""

import itertools
import time
from dataclasses import replace
from unittest import mock

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from moetuner import _workers
from moetuner.bounds import certify, decomposition
from moetuner.bounds.certificate import counting_bound
from moetuner.bounds.priced_sets import few_enough, visits
from moetuner.bounds.visits import RuleBook
from moetuner.errors import InvalidProblemError, MissingStatisticsError
from moetuner.evaluation.cost import CostModel, Homes, Wire
from moetuner.evaluation.hardware import HARDWARE
from moetuner.evaluation.replica_rule import ReplicaRule
from moetuner.evaluation.workload import Workload
from moetuner.placement.model import Placement
from moetuner.placement.topology import Topology
from moetuner.problem import Objective, PlacementProblem
from moetuner.solver import get_solver
from moetuner.trace import TOPIC_PRESETS, CountTrace, topic_trace
from oracle import oracle
from strategies import examples, make_trace, random_ids, random_placement
from tiny import SHAPES, tiny_problems


def bound_here(problem, known=None, replicas=None, whole=True):
    """`certify` without child processes, with or without pricing whole groups."""
    if replicas is None:
        replicas = problem.spare_slots > 0
    few = few_enough if whole else lambda *_: False
    with mock.patch.object(decomposition, "few_enough", few):
        parts = decomposition.Decomposition(
            problem, replicas=replicas, known=known
        ).pieces()
    book = RuleBook()
    return sum(part.bound(np.inf, 60, book) for part in parts)


@examples(12)
@given(tiny_problems())
def test_no_placement_beats_the_bound(case):
    problem, _ = case
    best = oracle(problem)
    for known, whole in itertools.product((None, best.placement), (True, False)):
        bound = bound_here(problem, known, replicas=False, whole=whole)
        assert bound <= best.value * (1 + 1e-9) + 1e-18


def test_homes_and_wires_that_leave_nothing_to_place_are_met_exactly(rng):
    """One expert per rank and uniform homes: every placement costs the same."""
    trace = make_trace(random_ids(rng, 200, 2, 4, 2), 4)
    cost = CostModel(shape=SHAPES[0], wire=Wire.PER_EXPERT, hardware=HARDWARE["h100"])
    problem = PlacementProblem.from_workload(
        Workload(traces=(trace,), cost=cost, batch_tokens=0),
        Topology(num_ranks=4, ranks_per_node=4),
    )
    best = oracle(problem)
    assert bound_here(problem) == pytest.approx(best.value, rel=1e-9)


def test_pairs_that_belong_together_are_seen(rng):
    """Tokens choose {0, 3}, {1, 4} or {2, 5}: a third of the copies, and it is proven.

    The bound is the optimum, where counting alone is far below it.
    """
    ids = np.array([[[0, 3]], [[4, 1]], [[2, 5]]] * 400, np.int16)
    problem = PlacementProblem.from_workload(
        Workload(traces=(make_trace(ids, 6),), cost=CostModel(shape=SHAPES[0])),
        Topology(num_ranks=3, ranks_per_node=3),
    )
    best = oracle(problem)
    for whole in (True, False):
        bound = bound_here(problem, best.placement, whole=whole)
        assert bound == pytest.approx(best.value, rel=1e-4)


def test_hops_inside_nodes_add_to_the_bound():
    """Four pairs of experts, two of four ranks in a node: a rank for each pair is best.

    By counting each token visits one rank, too; where pairs overlap it does not say so.
    """
    pairs = np.array([[[0, 1]], [[2, 3]], [[4, 5]], [[6, 7]]] * 400, np.int16)
    together = Placement(
        slot_experts=np.arange(8, dtype=np.int32)[None],
        layer_ids=np.zeros(1, np.int32),
        num_experts=8,
        topology=Topology(num_ranks=4, ranks_per_node=2),
    )
    slow = replace(HARDWARE["h100"], rank_bandwidth=5e9, rank_latency=0.0)
    cost = CostModel(shape=SHAPES[0], hardware=slow)
    problem = PlacementProblem.from_workload(
        Workload(traces=(make_trace(pairs, 8),), cost=cost, batch_tokens=0),
        together.topology,
    )
    best = problem.objective_value(together)
    assert bound_here(problem, together) == pytest.approx(best, rel=1e-4)
    circle = np.array([[[e, (e + 1) % 8]] for e in range(8)] * 200, np.int16)
    workload = Workload(traces=(make_trace(circle, 8),), cost=cost, batch_tokens=0)
    problem = replace(problem, workload=workload)
    counted = counting_bound(problem)
    bound, value = bound_here(problem, together), problem.objective_value(together)
    assert counted < 0.92 * value
    assert 0.995 * value < bound <= value * (1 + 1e-9)


def test_a_short_time_goes_to_links_first_and_each_begun_piece_proves_something():
    """Shares of 96 layers on many nodes were too short for any piece to end."""
    routing = replace(TOPIC_PRESETS["gpt-oss"], num_layers=2)
    trace = topic_trace(routing, num_tokens=3000, seed=1)
    problem = PlacementProblem.from_workload(
        Workload(traces=(trace,), cost=CostModel(shape=SHAPES[0])),
        Topology(num_ranks=16, ranks_per_node=2),
    )
    parts = decomposition.Decomposition(problem, replicas=False, known=None)
    pieces = parts.pieces()
    assert [piece.name for piece in pieces] == ["0", "1", "0 compute", "1 compute"]
    counted = [piece.bound(time.time(), 2000) for piece in pieces[:2]]
    late = time.time() + 100
    proven = [piece.bound(time.time(), 2000, last=late) for piece in pieces[:2]]
    assert all(now <= then for now, then in zip(counted, proven, strict=True))
    assert sum(counted) < sum(proven)


@pytest.mark.parametrize("wire", list(Wire))
def test_whole_groups_see_that_batches_peak_in_different_experts(rng, wire):
    """Nine experts, of which every batch likes three of its own; three ranks.

    Pooled, all are alike; batch by batch the experts of one should be apart.
    """
    choices = [rng.permuted(np.tile(np.arange(9), (300, 1)), axis=1)[:, :2]]
    for batch in range(3):
        liked = rng.permuted(np.tile(np.arange(3) + 3 * batch, (300, 1)), axis=1)
        choices.append(np.where(rng.random((300, 2)) < 0.8, liked[:, :2], -1))
    ids = np.concatenate(choices)[:, None].astype(np.int16)
    cost = CostModel(shape=SHAPES[0], wire=wire)
    problem = PlacementProblem.from_workload(
        Workload(traces=(make_trace(ids, 9),), cost=cost, batch_tokens=300),
        Topology(num_ranks=3, ranks_per_node=3),
    )
    best = oracle(problem)
    bound = bound_here(problem)
    assert bound <= best.value * (1 + 1e-9)
    gaps = [1 - each / best.value for each in (bound, bound_here(problem, whole=False))]
    assert gaps[0] < 0.01
    assert gaps[0] <= gaps[1]


@pytest.mark.parametrize("words_at_a_time", [1, 20, 1 << 18])
def test_visits_of_sets_are_counted(rng, monkeypatch, words_at_a_time):
    monkeypatch.setattr("moetuner.bounds.priced_sets._CHUNK", words_at_a_time)
    tokens = rng.integers(-1, 6, (200, 3))
    sets = np.array(list(itertools.combinations(range(7), 3)))
    expected = [np.isin(tokens, chosen).any(axis=1).sum() for chosen in sets]
    assert visits(tokens, sets).tolist() == expected


def test_where_there_are_too_many_sets_none_is_priced():
    assert few_enough(8, 4, 20)
    assert not few_enough(8, 8, 20)  # 4.4e9 sets
    assert not few_enough(8, 4, 2000)  # of so many batches


@examples(15)
@given(tiny_problems(spare=1), st.sampled_from(ReplicaRule))
def test_replicas_do_not_beat_the_bound_that_allows_them(case, rule):
    """By no rule: a bound takes whichever replica is best."""
    problem, rng = case
    cost = replace(problem.workload.cost, replica_rule=rule)
    problem = replace(problem, workload=replace(problem.workload, cost=cost))
    bound = bound_here(problem)
    for _ in range(20):
        placement = random_placement(rng, problem.workload.traces[0], problem.topology)
        slots = placement.slot_experts.reshape(
            problem.num_layers, problem.topology.num_ranks, -1
        )
        wide = np.full((*slots.shape[:2], problem.slots_per_rank), -1, np.int32)
        wide[..., : slots.shape[2]] = slots
        for layer in wide:
            for rank in layer:
                missing = np.setdiff1d(np.arange(problem.num_experts), rank)
                free = np.flatnonzero(rank < 0)
                chosen = rng.permutation(missing)[: free.size]
                rank[free[: chosen.size]] = chosen
        replicated = Placement(
            slot_experts=wide.reshape(problem.num_layers, -1),
            layer_ids=placement.layer_ids,
            num_experts=problem.num_experts,
            topology=problem.topology,
        )
        value = problem.objective_value(replicated)
        assert bound <= value * (1 + 1e-9) + 1e-18


def medium(rng, **options):
    ids = random_ids(rng, 3000, 4, 16, 3)
    cost = CostModel(shape=SHAPES[0], **options)
    return PlacementProblem.from_workload(
        Workload(traces=(make_trace(ids, 16, ranked=True),), cost=cost),
        Topology(num_ranks=8, ranks_per_node=4),
    )


@pytest.mark.parametrize("homes", [Homes.UNIFORM, Homes.FOLLOW])
def test_children_find_what_is_found_here_and_more_time_never_hurts(rng, homes):
    problem = medium(rng, homes=homes)
    placement = get_solver("contiguous").solve(problem).placement
    seen = []
    proof = certify(
        problem,
        placement,
        max_iterations=60,
        threads=1,  # what one piece teaches another depends on the order
        progress=lambda *news: seen.append(news),
    )
    here = bound_here(problem, placement)
    assert proof.lower_bound == pytest.approx(here, rel=1e-6)
    assert proof.value == problem.objective_value(placement)
    assert proof.gap == pytest.approx(1 - here / proof.value, rel=1e-4)
    assert [done for done, _, _ in seen] == list(range(1, len(seen[:]) + 1))
    assert seen[-1][2] == pytest.approx(proof.lower_bound, rel=1e-9)
    hurried = certify(problem, placement, time_limit=1e-3)
    assert hurried.lower_bound >= hurried.counting_bound * (1 - 1e-9)
    assert hurried.lower_bound <= proof.lower_bound * (1 + 1e-6)


def test_a_child_that_dies_costs_the_search_not_the_bound(rng, monkeypatch):
    problem = medium(rng)
    monkeypatch.setattr(_workers, "_CHILD", "raise SystemExit(1)")
    proof = certify(problem, threads=2)
    assert proof.lower_bound == pytest.approx(proof.counting_bound)
    assert proof.gap is None


def test_senseless_questions_are_refused(rng):
    problem = medium(rng)
    with pytest.raises(InvalidProblemError, match="wanted objective modelled-time"):
        certify(replace(problem, objective=Objective.MAX_LOAD))
    with pytest.raises(InvalidProblemError, match="time_limit must be > 0 s, got -1"):
        certify(problem, time_limit=-1)
    counted = CountTrace(
        counts=np.ones((1, 4, 16), np.int64),
        num_tokens=np.ones(1, np.int64),
        layer_ids=np.arange(4, dtype=np.int32),
    )
    workload = replace(problem.workload, traces=(counted,))
    with pytest.raises(MissingStatisticsError, match="wire=dedup needs the experts"):
        certify(replace(problem, workload=workload))
