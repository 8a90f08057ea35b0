"""The numbers of figures, against the problem's own and against counting by hand."""

import numpy as np
from hypothesis import given
from hypothesis import strategies as st
from moetuner.evaluation.workload import Workload
from moetuner.placement.model import Placement, contiguous_rank_of
from moetuner.problem import Objective, PlacementProblem
from moetuner.report.quantities import (
    experts_by_rank,
    flow_levels,
    rank_flows,
    rank_shares,
    ranks_in_order,
    relative_load,
    together,
    traffic_per_token,
)
from moetuner.trace.statistics import RoutingStatistics
from strategies import random_placement, topologies, traces


def test_load_and_traffic_are_the_evaluators_in_other_units(make_report):
    scores = make_report().result.evaluation
    load = relative_load(scores)
    np.testing.assert_allclose(load.max(axis=1), scores.imbalance)
    np.testing.assert_allclose(load.mean(axis=1), 1)
    traffic = traffic_per_token(scores)
    assert np.isnan(np.diag(traffic)).all()
    assert np.isclose(np.nansum(traffic) / len(traffic), scores.remote_ranks_per_token)


@given(trace=traces(), topology=topologies, extra=st.integers(0, 2))
def test_order_of_ranks_lists_every_filled_slot(trace, topology, extra):
    placement = random_placement(np.random.default_rng(5), trace, topology, extra)
    for layer in range(placement.num_layers):
        ranks = ranks_in_order(placement, layer)
        assert (np.diff(ranks) >= 0).all()
        shares = rank_shares(placement, layer)
        np.testing.assert_allclose(shares.sum(axis=1), 1)
        for expert, rank in zip(experts_by_rank(placement, layer), ranks, strict=True):
            assert shares[expert, rank] > 0
        assert (shares > 0).sum() == len(ranks)


@given(trace=traces(), topology=topologies, extra=st.integers(0, 2))
def test_pairs_on_one_rank_are_counted_token_by_token(trace, topology, extra):
    placement = random_placement(np.random.default_rng(6), trace, topology, extra)
    counts = RoutingStatistics.from_trace(trace).coactivation
    slots = placement.slot_experts.reshape(
        placement.num_layers, topology.num_ranks, placement.slots_per_rank
    )
    for layer, share in enumerate(together(placement, counts)):
        held = [set(row.tolist()) - {-1} for row in slots[layer]]
        met = total = 0
        for row in trace.topk_ids[:, layer]:
            chosen = [expert for expert in row.tolist() if expert >= 0]
            for a in chosen:
                for b in chosen:
                    total += a != b
                    met += a != b and any({a, b} <= rank for rank in held)
        assert np.isclose(share, met / total if total else 1)


@given(trace=traces(), topology=topologies)
def test_flows_are_those_of_the_problem(trace, topology):
    blocks = contiguous_rank_of(trace.num_layers, trace.num_experts, topology.num_ranks)
    placement = Placement.from_rank_of(
        np.random.default_rng(7).permuted(blocks, axis=1),
        layer_ids=trace.layer_ids,
        topology=topology,
    )
    statistics = RoutingStatistics.from_trace(trace)
    problem = PlacementProblem.from_workload(
        Workload(traces=(trace,)), topology, objective=Objective.TOTAL_TRAFFIC
    )
    flows = rank_flows(placement, statistics.transitions)
    np.testing.assert_allclose(flows, problem.rank_flows(placement.rank_of()))
    levels = flow_levels(placement, flows)
    seen = flows.sum(axis=(1, 2)) > 0
    np.testing.assert_allclose(levels.sum(axis=1), seen)
    weight = flows.sum(axis=(1, 2)) / max(flows.sum(), 1)
    moves = (1 - levels[:, 0]) @ weight if flows.sum() else 0.0
    assert np.isclose(moves, problem.objective_value(placement))
