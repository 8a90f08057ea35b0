import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from moetuner.errors import InvalidTraceError
from moetuner.evaluation.cost import CostModel, Homes, Wire
from moetuner.evaluation.evaluate import (
    Draws,
    GainInterval,
    bootstrap_seconds,
    draw_batches,
    evaluate,
    paired_gain,
)
from moetuner.evaluation.hardware import Hardware
from moetuner.evaluation.models import ModelShape
from moetuner.evaluation.tally import tally
from moetuner.evaluation.workload import BatchKind, Workload, price
from moetuner.placement.model import Placement
from moetuner.placement.topology import Topology
from moetuner.problem import Objective, PlacementProblem
from moetuner.solver import SolverOptions, get_solver
from moetuner.trace import CountTrace, read_trace, split_by_sequence
from strategies import (
    make_trace,
    random_ids,
    random_placement,
    topologies,
    traces,
)

# Numbers small enough to count by hand: a row takes 1 s to compute, an active expert
# 2.5 s to load; on its way out a row takes 1 s inside a node and 2 s between nodes (two
# network cards together), on its way back twice as long.
TOY = Hardware(
    name="toy",
    memory_bandwidth=8,
    matmul_rate=20,
    rank_bandwidth=10,
    nic_bandwidth=2.5,
    rank_latency=0.25,
    node_latency=0.5,
)
TOY_SHAPE = ModelShape(
    hidden_size=10,
    expert_hidden_size=1,
    num_projections=1,
    dispatch_bytes=1,
    combine_bytes=2,
    weight_bytes=2,
)
TWO_NODES = Topology(num_ranks=4, ranks_per_node=2)


def toy_cost(wire=Wire.DEDUP, homes=Homes.UNIFORM):
    return CostModel(hardware=TOY, shape=TOY_SHAPE, wire=wire, homes=homes)


def toy_trace():
    """Tokens A, B, C that start on ranks 0, 1, 3, over two layers."""
    ids = np.array(
        [[[2, 1], [1, 0]], [[1, 0], [3, 2]], [[3, 1], [2, 3]]],
        np.int16,
    )
    return make_trace(ids, 4, ranked=True, home_rank=np.array([0, 1, 3], np.int16))


def expert_on_its_rank(num_layers=2, topology=TWO_NODES):
    """Expert e on rank e, in every layer."""
    ranks = np.arange(topology.num_ranks, dtype=np.int32)
    return Placement(
        slot_experts=np.tile(ranks, (num_layers, 1)),
        layer_ids=np.arange(num_layers, dtype=np.int32),
        num_experts=topology.num_ranks,
        topology=topology,
    )


# dispatch and combine [layer 0, layer 1] in seconds; remote ranks and nodes summed over
# tokens and layers; busiest receiver [layer 0, layer 1] in rows. For example recorded
# homes, dedup, layer 0: A 0 -> {1, 2}, B 1 -> {0}, C 3 -> {1} is one row on the busiest
# rank link and one between the nodes: 1 + 2 + 0.5 out, 2 + 4 + 0.5 back, or, where the
# hops overlap, max(1, 2) + 0.5 and max(2, 4) + 0.5.
BY_HAND = {
    (Wire.DEDUP, Homes.RECORDED): ([3.5, 4.5], [6.5, 8.5], 8, 3, [2, 2]),
    (Wire.DEDUP, Homes.UNIFORM): ([5, 3.5], [9.5, 6.5], 9, 4, [2.25, 1.5]),
    (Wire.DEDUP, Homes.FOLLOW): ([5, 4.5], [10.5, 2.25], 9.5, 4.5, [2.25, 2]),
    (Wire.DEDUP_PIPELINED, Homes.RECORDED): ([2.5, 2.5], [4.5, 4.5], 8, 3, [2, 2]),
    (Wire.DEDUP_PIPELINED, Homes.UNIFORM): ([3.5, 2.5], [6.5, 4.5], 9, 4, [2.25, 1.5]),
    (Wire.DEDUP_PIPELINED, Homes.FOLLOW): (
        *([3.5, 2.5], [8.5, 2.25]),
        *(9.5, 4.5, [2.25, 2]),
    ),
    (Wire.PER_EXPERT, Homes.RECORDED): ([2.5, 4.5], [4.5, 8.5], 8, 3, [2, 2]),
    (Wire.PER_EXPERT, Homes.UNIFORM): ([4.5, 4.5], [8.5, 8.5], 9, 4, [2.25, 1.5]),
    (Wire.PER_EXPERT, Homes.FOLLOW): ([4.5, 4.5], [8.5, 2.25], 9.5, 4.5, [2.25, 2]),
    (Wire.DEDUP_RANKS, Homes.RECORDED): ([2.5, 4.5], [4.5, 8.5], 8, 3, [2, 2]),
    # Around the ring 0 -> 1 => 2 -> 3 => 0: all but those of rank 2 cross => 2.
    (Wire.ALLGATHER, Homes.RECORDED): ([6.5, 6.5], [12.5, 12.5], 8, 3, [3, 3]),
    (Wire.ALLGATHER, Homes.UNIFORM): ([5, 5], [9.5, 9.5], 9, 4, [2.25, 2.25]),
    (Wire.ALLGATHER, Homes.FOLLOW): ([5, 6.5], [12.5, 12.5], 9.5, 4.5, [2.25, 3]),
}


@pytest.mark.parametrize(("wire", "homes"), BY_HAND)
def test_scores_counted_by_hand(wire, homes):
    dispatch, combine, remote_ranks, remote_nodes, received = BY_HAND[wire, homes]
    cost, placement = toy_cost(wire, homes), expert_on_its_rank()
    seconds = price(tally(toy_trace(), placement, wire=wire, homes=homes), cost)
    assert seconds.compute[0].tolist() == [3, 2.5]  # 3 rows; at most 2: the weights
    assert seconds.dispatch[0].tolist() == dispatch
    assert seconds.combine[0].tolist() == combine

    score = evaluate(toy_trace(), placement, cost)
    assert score.num_tokens == 3
    assert score.rank_rows.tolist() == [[1, 3, 1, 1], [1, 1, 2, 2]]
    assert score.imbalance.tolist() == [2, 2 / 1.5]
    assert score.imbalance_mean == pytest.approx(5 / 3)
    assert score.imbalance_worst == 2
    assert score.remote_ranks_per_token == pytest.approx(remote_ranks / 6)
    assert score.remote_nodes_per_token == pytest.approx(remote_nodes / 6)
    assert score.bottleneck_receive == pytest.approx(sum(received) / 2 / (3 / 4))
    assert score.compute_seconds == 5.5
    assert score.dispatch_seconds == sum(dispatch)
    assert score.combine_seconds == sum(combine)
    assert score.modelled_seconds == 5.5 + sum(dispatch) + sum(combine)


@pytest.mark.parametrize(
    ("wire", "dispatch", "combine"),
    [(Wire.DEDUP, 1.25, 2.25), (Wire.PER_EXPERT, 2.25, 4.25)],
)
def test_two_experts_on_one_rank_share_a_row(wire, dispatch, combine):
    """Home 0, experts 2 and 3 on rank 1 of the same node: one row, or two."""
    trace = make_trace(
        np.array([[[2, 3]]], np.int16), 4, home_rank=np.zeros(1, np.int16)
    )
    placement = Placement(
        slot_experts=np.arange(4, dtype=np.int32)[None],
        layer_ids=trace.layer_ids,
        num_experts=4,
        topology=Topology(num_ranks=2, ranks_per_node=2),
    )
    score = evaluate(trace, placement, toy_cost(wire, Homes.RECORDED))
    assert score.dispatch_seconds == dispatch
    assert score.combine_seconds == combine
    assert score.compute_seconds == 5  # two experts to load
    assert score.traffic.tolist() == [[0, 1 if wire is Wire.DEDUP else 2], [0, 0]]


@given(trace=traces(), wire=st.sampled_from(Wire), homes=st.sampled_from(Homes))
def test_on_one_rank_nothing_is_remote(trace, wire, homes):
    if not trace.num_tokens:
        return
    if homes is Homes.RECORDED:
        trace = make_trace(
            trace.topk_ids.copy(),
            trace.num_experts,
            home_rank=np.zeros(trace.num_tokens, np.int16),
        )
    topology = Topology(num_ranks=1, ranks_per_node=1)
    placement = random_placement(np.random.default_rng(0), trace, topology)
    score = evaluate(trace, placement, toy_cost(wire, homes))
    assert score.remote_ranks_per_token == score.remote_nodes_per_token == 0
    assert score.dispatch_seconds == score.combine_seconds == 0
    assert score.bottleneck_receive == 0
    assert score.imbalance_worst == 1
    assert score.modelled_seconds == score.compute_seconds


@given(
    trace=traces(),
    topology=topologies,
    wire=st.sampled_from(Wire),
    seed=st.integers(0, 2**32 - 1),
)
def test_relabelling_ranks_changes_nothing(trace, topology, wire, seed):
    """Uniform homes: nodes, and ranks inside each node, are all alike.

    Without replicas: which of two equally near ones serves depends on their numbers.
    """
    if not trace.num_tokens:
        return
    rng = np.random.default_rng(seed)
    num_ranks = topology.num_ranks
    rank_of = rng.integers(0, num_ranks, (trace.num_layers, trace.num_experts))
    ranks = np.arange(num_ranks).reshape(topology.num_nodes, -1)
    renamed = rng.permuted(rng.permutation(ranks), axis=1).ravel()
    before, after = (
        evaluate(
            trace,
            Placement.from_rank_of(each, layer_ids=trace.layer_ids, topology=topology),
            toy_cost(wire),
        )
        for each in (rank_of, renamed[rank_of])
    )
    assert after.modelled_seconds == before.modelled_seconds
    assert after.remote_ranks_per_token == before.remote_ranks_per_token
    assert after.imbalance.tolist() == before.imbalance.tolist()


@given(trace=traces(), topology=topologies, homes=st.sampled_from(Homes))
def test_seconds_are_the_sum_over_layers(trace, topology, homes):
    if not trace.num_tokens or (homes is Homes.RECORDED and topology.num_ranks != 4):
        return
    placement = random_placement(np.random.default_rng(0), trace, topology)
    cost = toy_cost(homes=homes)
    score = evaluate(trace, placement, cost)
    layers = price(tally(trace, placement, homes=homes), cost)
    by_layer = layers.compute[0] + layers.dispatch[0] + layers.combine[0]
    assert score.modelled_seconds == pytest.approx(by_layer.sum())
    parts = score.compute_seconds + score.dispatch_seconds + score.combine_seconds
    assert score.modelled_seconds == pytest.approx(parts)


def test_an_empty_trace_has_no_score():
    trace = make_trace(np.zeros((0, 2, 1), np.int16), 4)
    with pytest.raises(InvalidTraceError, match="the trace has no tokens"):
        evaluate(trace, expert_on_its_rank(), toy_cost())


def test_json_holds_the_promised_fields():
    score = evaluate(toy_trace(), expert_on_its_rank(), toy_cost())
    fields = json.loads(json.dumps(score.to_json(), allow_nan=False))
    assert fields["imbalance_mean"] == pytest.approx(5 / 3)
    assert fields["imbalance_worst"] == 2
    assert fields["remote_ranks_per_token"] == 1.5
    assert fields["remote_nodes_per_token"] == pytest.approx(4 / 6)
    assert fields["modelled_seconds"] == 30
    assert fields["rank_rows"] == [[1, 3, 1, 1], [1, 1, 2, 2]]


def test_what_a_count_only_source_cannot_tell_is_null():
    counts = CountTrace(
        counts=np.array([[[4, 2, 1, 1]]]),
        num_tokens=np.array([4]),
        layer_ids=np.zeros(1, np.int32),
    )
    score = evaluate(counts, expert_on_its_rank(1), toy_cost(Wire.ALLGATHER))
    assert score.imbalance_mean == 2
    assert score.compute_seconds == 4
    fields = json.loads(json.dumps(score.to_json(), allow_nan=False))
    assert fields["remote_ranks_per_token"] is None
    assert fields["remote_nodes_per_token"] is None


def bootstrap_case(num_sequences, seed=0):
    rng = np.random.default_rng(seed)
    ids = random_ids(rng, 400, 3, 8, 2)
    sequence = np.arange(400, dtype=np.int32) % num_sequences
    trace = make_trace(ids, 8, sequence=sequence)
    return trace, [random_placement(rng, trace, TWO_NODES) for _ in range(2)]


def test_bootstrap_starts_with_the_real_trace_and_repeats_by_seed():
    trace, (placement, _) = bootstrap_case(20)
    seconds = bootstrap_seconds(trace, placement, toy_cost(), samples=50, seed=3)
    assert seconds.shape == (51,)
    real = evaluate(trace, placement, toy_cost()).modelled_seconds
    assert seconds[0] == pytest.approx(real)
    again = bootstrap_seconds(trace, placement, toy_cost(), samples=50, seed=3)
    other = bootstrap_seconds(trace, placement, toy_cost(), samples=50, seed=4)
    assert seconds.tolist() == again.tolist()
    assert seconds[1:].tolist() != other[1:].tolist()


def draws_of(trace, placement, batch_tokens, kind=BatchKind.SEQUENCES):
    score = evaluate(
        trace, placement, toy_cost(), batch_tokens=batch_tokens, batch_kind=kind
    )
    return draw_batches(trace, placement, toy_cost(), score, kind), score


@pytest.mark.parametrize("kind", list(BatchKind))
@pytest.mark.parametrize("batch_tokens", [0, 40, 200])
def test_the_interval_contains_the_gain_in_the_mean_batch(batch_tokens, kind):
    for seed in range(5):
        trace, placements = bootstrap_case(20, seed)
        found = [draws_of(trace, each, batch_tokens, kind) for each in placements]
        (before, old), (after, new) = found
        gain = paired_gain(before, after)
        wanted = 1 - new.batch_seconds_mean / old.batch_seconds_mean
        assert gain.gain == pytest.approx(wanted)
        assert gain.low <= gain.gain <= gain.high
        assert gain.low < gain.high
        narrow = paired_gain(before, after, confidence=0.5)
        assert gain.low <= narrow.low < narrow.high <= gain.high


def test_batches_of_whole_sequences_are_drawn_others_from_sequences():
    trace, (placement, _) = bootstrap_case(20)
    for tokens, kind, units in (
        (40, BatchKind.SEQUENCES, 10),
        (50, BatchKind.SEQUENCES, 20),
        (0, BatchKind.SEQUENCES, 20),
        (50, BatchKind.MIXED, 20),
    ):
        draws, score = draws_of(trace, placement, tokens, kind)
        assert draws.units == units
        assert draws.seconds[0] == score.batch_seconds_mean
        times = score.batch_seconds
        if units == 10:
            assert (draws.seconds[1:] >= times.min()).all()
            assert (draws.seconds[1:] <= times.max()).all()
        else:
            assert np.median(draws.seconds[1:]) == pytest.approx(draws.seconds[0])


@pytest.mark.parametrize("units", [4, 8, 40])
def test_intervals_of_few_batches_are_as_wide_as_they_should_be(units):
    """About 95 of 100 intervals hold the true gain; percentiles of 4 would not."""
    rng = np.random.default_rng(units)
    held = 0
    for _ in range(400):
        times = rng.normal([1.0, 0.97], 0.02, (units, 2))
        weights = rng.multinomial(units, np.full(units, 1 / units), 500) / units
        before, after = (
            Draws(seconds=np.concatenate([[c.mean()], weights @ c]), units=units)
            for c in times.T
        )
        gain = paired_gain(before, after)
        held += gain.low <= 0.03 <= gain.high
    assert 0.92 * 400 <= held <= 0.99 * 400


def test_a_placement_gains_nothing_over_itself():
    """Draws are paired: the same batches are drawn for every placement."""
    trace, (placement, _) = bootstrap_case(20)
    twice = [draws_of(trace, placement, 50)[0] for _ in range(2)]
    found = paired_gain(*twice)
    assert (found.gain, found.low, found.high) == (0, 0, 0)
    assert not found.certain


@pytest.mark.parametrize(
    ("low", "high", "certain"),
    [(0.1, 0.2, True), (-0.2, -0.1, True), (-0.1, 0.2, False), (0.0, 0.1, False)],
)
def test_a_gain_is_certain_when_zero_is_outside(low, high, certain):
    found = GainInterval(gain=0.05, low=low, high=high, confidence=0.95)
    assert found.certain is certain


def test_without_two_sequences_there_is_no_interval():
    trace, (placement, _) = bootstrap_case(1)
    assert np.isnan(bootstrap_seconds(trace, placement, toy_cost())).all()
    untold = make_trace(trace.topk_ids.copy(), 8)
    times = bootstrap_seconds(untold, placement, toy_cost(), samples=3)
    assert times.shape == (4,)
    assert np.isnan(times).all()
    for lonely in (trace, untold):
        draws = draws_of(lonely, placement, 50, BatchKind.MIXED)[0]
        assert np.isnan(draws.seconds).all()
        assert paired_gain(draws, draws) is None


# What an independent implementation measured, planned on one half and scored on the
# other of another split: mean over layers of max/mean load, and remote ranks per token,
# for contiguous blocks and for LPT. Over six splits ours move by up to 0.065.
SPLIT_TOLERANCE = 0.065
REAL = {
    "gpt-oss-20b-fingerprinting/mmlu": ((1.51, 3.14), (1.10, 3.15)),
    "deepseek-v2-lite-esft/law": ((1.39, 3.98), (1.07, 4.03)),
    "deepseek-v2-lite-chat-moe-beyond/prompts": ((1.12, 3.98), (1.06, 4.00)),
}


@pytest.mark.parametrize("name", REAL)
def test_real_traces_score_as_measured_before(traces_dir, name):
    split = split_by_sequence(read_trace(traces_dir / f"{name}.npz"))
    problem = PlacementProblem.from_workload(
        Workload(traces=(split.plan,)),
        Topology(num_ranks=8, ranks_per_node=4),
        objective=Objective.MAX_LOAD,
    )
    for solver, expected in zip(("contiguous", "lpt"), REAL[name], strict=True):
        placement = get_solver(solver).solve(problem, SolverOptions()).placement
        score = evaluate(split.score, placement, CostModel())
        measured = (score.imbalance_mean, score.remote_ranks_per_token)
        assert measured == pytest.approx(expected, abs=SPLIT_TOLERANCE)
