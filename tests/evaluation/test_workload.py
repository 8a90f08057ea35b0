"""Batches of a trace, and the modelled time that is the mean over them."""

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from moetuner.errors import (
    InvalidPlacementError,
    InvalidProblemError,
    InvalidTraceError,
)
from moetuner.evaluation import workload as workload_module
from moetuner.evaluation.cost import CostModel, Homes, Wire
from moetuner.evaluation.evaluate import draw_batches, evaluate
from moetuner.evaluation.workload import BatchKind, Workload, batch_index
from moetuner.placement.topology import Topology
from moetuner.problem import Objective, PlacementProblem
from moetuner.trace import CountTrace
from moetuner.trace.split import select
from strategies import (
    TOY_COST,
    make_trace,
    random_ids,
    random_placement,
    topologies,
    traces,
)

COST = TOY_COST


def long_trace(seed=0, num_tokens=300, num_sequences=20):
    rng = np.random.default_rng(seed)
    ids = random_ids(rng, num_tokens, 3, 8, 2, skew=2.0)
    sequence = np.sort(rng.integers(0, num_sequences, num_tokens)).astype(np.int32)
    return make_trace(
        ids,
        8,
        sequence=sequence,
        ranked=True,
        home_rank=rng.integers(0, 4, num_tokens).astype(np.int16),
    )


@pytest.mark.parametrize("batch_tokens", [30, 100, 299, 5000])
def test_batches_are_whole_sequences_of_about_that_size(batch_tokens):
    trace = long_trace()
    assert np.bincount(trace.sequence).max() <= 30
    batches = batch_index(trace, batch_tokens)
    used = np.unique(batches)
    assert used.tolist() == list(range(used.size))
    for sequence in np.unique(trace.sequence):
        assert np.unique(batches[trace.sequence == sequence]).size == 1
    longest = np.bincount(trace.sequence).max()
    if longest < batch_tokens < trace.num_tokens:
        sizes = np.bincount(batches)
        target = trace.num_tokens / round(trace.num_tokens / batch_tokens)
        assert np.abs(sizes - target).max() <= longest


def test_batches_keep_the_order_of_the_trace_not_of_the_sequence_numbers():
    ids = np.zeros((6, 1, 1), np.int16)
    trace = make_trace(ids, 2, sequence=np.array([9, 9, 4, 4, 7, 7], np.int32))
    assert batch_index(trace, 2).tolist() == [0, 0, 1, 1, 2, 2]


@pytest.mark.parametrize("batch_tokens", [1, 7, 10])
def test_a_sequence_that_is_longer_than_a_batch_is_cut_into_chunks(batch_tokens):
    """Chunked prefill: chunks in order, full batches, short sequences whole."""
    trace = long_trace()
    lengths = np.bincount(trace.sequence)
    batches = batch_index(trace, batch_tokens)
    sizes = np.bincount(batches)
    short = lengths[lengths <= batch_tokens].max(initial=0)
    assert sizes.max() <= batch_tokens + short
    assert sizes.size == round(trace.num_tokens / batch_tokens)
    for sequence, length in enumerate(lengths):
        own = batches[trace.sequence == sequence]
        assert (np.diff(own) >= 0).all()
        if length <= batch_tokens:
            assert np.unique(own).size == 1
        else:
            assert np.unique(own).size >= length / (batch_tokens + short)


def test_only_what_is_too_long_for_a_batch_is_cut():
    ids = np.zeros((12, 1, 1), np.int16)
    sequence = np.array([5, 5, 1, 1, 1, 1, 1, 1, 1, 8, 8, 8], np.int32)
    trace = make_trace(ids, 2, sequence=sequence)
    assert batch_index(trace, 4).tolist() == [0, 0, 0, 0, 1, 1, 1, 1, 2, 2, 2, 2]
    whole = batch_index(trace, 4, chunk_tokens=7)
    assert whole.tolist() == [0, 0, 1, 1, 1, 1, 1, 1, 1, 2, 2, 2]
    assert batch_index(trace, 0).tolist() == [0] * 12


def test_chunks_are_of_a_sequence_whose_tokens_lie_apart():
    """As a recording by passes has them: two sequences in turn."""
    ids = np.zeros((12, 1, 1), np.int16)
    trace = make_trace(ids, 2, sequence=np.array([0, 1] * 6, np.int32))
    batches = batch_index(trace, 3)
    assert batches[::2].tolist() == [0, 0, 0, 1, 1, 1]
    assert batches[1::2].tolist() == [2, 2, 2, 3, 3, 3]


@pytest.mark.parametrize("batch_tokens", [1, 4, 9, 20, 21, 5000])
def test_a_decode_step_has_at_most_one_token_of_a_sequence(batch_tokens):
    trace = long_trace()
    trace = replace(trace, phase=np.ones(300, np.uint8))
    steps = batch_index(trace, batch_tokens, BatchKind.MIXED)
    sizes = np.bincount(steps)
    assert sizes.max() <= batch_tokens
    assert sizes.max() - sizes.min() <= 1
    pairs = set(zip(steps.tolist(), trace.sequence.tolist(), strict=True))
    assert len(pairs) == 300
    longest = np.bincount(trace.sequence).max()
    assert sizes.size == max(-(-300 // batch_tokens), longest)


def test_tokens_of_both_phases_are_shuffled_as_ever():
    trace = long_trace()
    both = replace(trace, phase=(np.arange(300) % 2).astype(np.uint8))
    alone = replace(trace, phase=np.ones(300, np.uint8), sequence=None)
    for other in (both, alone):  # nobody says that a step has one of each
        found = batch_index(other, 100, BatchKind.MIXED)
        assert found.tolist() == batch_index(trace, 100, BatchKind.MIXED).tolist()


def test_batches_that_share_a_sequence_are_not_drawn_alone():
    """Chunks of one prompt vary together: whole sequences are drawn then."""
    trace = long_trace(num_tokens=600, num_sequences=12)
    placement = random_placement(
        np.random.default_rng(1), trace, Topology(num_ranks=4, ranks_per_node=2)
    )
    units = {}
    for batch_tokens in (20, 60):
        scores = evaluate(trace, placement, COST, batch_tokens=batch_tokens)
        drawn = draw_batches(trace, placement, COST, scores)
        units[batch_tokens] = drawn.units
    assert np.bincount(trace.sequence).max() > 20
    assert units[20] == 12


def test_mixed_batches_take_tokens_of_all_sequences():
    trace = long_trace()
    batches = batch_index(trace, 100, BatchKind.MIXED)
    assert np.bincount(batches).tolist() == [100, 100, 100]
    for batch in range(3):
        assert np.unique(trace.sequence[batches == batch]).size > 10
    assert batches.tolist() == batch_index(trace, 100, BatchKind.MIXED).tolist()


@given(
    traces(),
    topologies,
    st.sampled_from(Wire),
    st.sampled_from(Homes),
    st.sampled_from(BatchKind),
    st.integers(0, 6),
    st.integers(0, 2),
)
def test_the_objective_is_what_the_evaluator_says_of_each_batch_alone(
    trace, topology, wire, homes, kind, batch_tokens, extra_slots
):
    if not trace.num_tokens or topology.num_ranks > trace.num_experts:
        return
    if homes is Homes.RECORDED:
        home = (trace.home_rank % topology.num_ranks).astype(np.int16)
        trace = replace(trace, home_rank=home)
    rng = np.random.default_rng(trace.num_tokens)
    cost = replace(COST, wire=wire, homes=homes)
    placement = random_placement(rng, trace, topology, extra_slots)
    workload = Workload(
        traces=(trace,), cost=cost, batch_tokens=batch_tokens, batch_kind=kind
    )
    problem = PlacementProblem.from_workload(
        workload, topology, slots_per_rank=placement.slots_per_rank
    )
    value = problem.objective_value(placement)
    whole = evaluate(trace, placement, cost, batch_tokens=batch_tokens, batch_kind=kind)
    assert whole.batch_seconds_mean == value
    assert whole.batch_seconds.mean() == value
    if placement.has_replicas:
        return  # which replica serves a token depends on its index in the trace
    alone = [
        evaluate(
            select(trace, problem.workload.batches[0] == batch), placement, cost
        ).modelled_seconds
        for batch in range(whole.batch_seconds.size)
    ]
    assert whole.batch_seconds == pytest.approx(alone, rel=1e-12)


def test_pooled_is_one_batch():
    trace = long_trace()
    placement = random_placement(
        np.random.default_rng(1), trace, Topology(num_ranks=4, ranks_per_node=2)
    )
    score = evaluate(trace, placement, COST, batch_tokens=0)
    assert score.batch_seconds.tolist() == [score.modelled_seconds]
    assert score.batch_seconds_p99 == score.modelled_seconds
    many = evaluate(trace, placement, COST, batch_tokens=50)
    assert many.batch_seconds.sum() > score.modelled_seconds  # batches peak apart
    assert many.batch_seconds_mean < many.batch_seconds_p95 <= many.batch_seconds_p99


def test_several_traces_count_as_weighted_or_by_the_worst():
    parts = [long_trace(seed) for seed in range(2)]
    topology = Topology(num_ranks=4, ranks_per_node=2)
    placement = random_placement(np.random.default_rng(1), parts[0], topology)
    each = [
        evaluate(part, placement, COST, batch_tokens=100).batch_seconds_mean
        for part in parts
    ]
    both = Workload(traces=tuple(parts), cost=COST, batch_tokens=100, weights=(3, 1))
    problem = PlacementProblem.from_workload(both, topology)
    assert problem.objective_value(placement) == pytest.approx(
        0.75 * each[0] + 0.25 * each[1]
    )
    assert problem.statistics.num_tokens == 3 * 300 + 300  # as they count
    assert problem.statistics.load.sum() == 2 * 1200 * 3
    worst = replace(problem, workload=replace(both, worst_case=True))
    assert worst.objective_value(placement) == max(each)


def test_groups_of_a_count_only_source_are_gathered_into_batches():
    counts = np.arange(24, dtype=np.int64).reshape(6, 1, 4)
    trace = CountTrace(
        counts=counts,
        num_tokens=counts.sum(axis=(1, 2)),
        layer_ids=np.zeros(1, np.int32),
    )
    topology = Topology(num_ranks=2, ranks_per_node=2)
    placement = random_placement(np.random.default_rng(0), trace, topology)
    cost = replace(COST, wire=Wire.ALLGATHER)
    batches = batch_index(trace, 100)
    assert batches.tolist() == [0, 0, 0, 1, 1, 2]
    score = evaluate(trace, placement, cost, batch_tokens=100)
    for batch in range(3):
        part = replace(
            trace,
            counts=counts[batches == batch],
            num_tokens=trace.num_tokens[batches == batch],
        )
        alone = evaluate(part, placement, cost).modelled_seconds
        assert score.batch_seconds[batch] == pytest.approx(alone)


def test_a_slow_rank_computes_longer():
    trace = long_trace()
    topology = Topology(num_ranks=4, ranks_per_node=4)
    placement = random_placement(np.random.default_rng(0), trace, topology)
    alike = evaluate(trace, placement, replace(COST, rank_speeds=(1, 1, 1, 1)))
    assert alike.modelled_seconds == evaluate(trace, placement, COST).modelled_seconds
    halved = evaluate(trace, placement, replace(COST, rank_speeds=(0.5,) * 4))
    assert halved.compute_seconds == pytest.approx(2 * alike.compute_seconds)
    assert halved.dispatch_seconds == alike.dispatch_seconds
    slow = replace(COST, rank_speeds=(1, 1, 1))
    with pytest.raises(InvalidProblemError, match="names 3 ranks, the topology has 4"):
        evaluate(trace, placement, slow)
    with pytest.raises(InvalidProblemError, match="rank_speeds must be positive"):
        replace(COST, rank_speeds=(1, 0, 1, 1))


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"traces": ()}, InvalidTraceError, "at least one trace"),
        ({"batch_tokens": -1}, InvalidProblemError, "batch_tokens must be a whole"),
        ({"batch_tokens": 2.5}, InvalidProblemError, "batch_tokens must be a whole"),
        ({"batch_kind": "odd"}, InvalidProblemError, "one of sequences, mixed"),
        ({"weights": (1, 2)}, InvalidProblemError, "weights must be 1 positive"),
        ({"weights": (0,)}, InvalidProblemError, "weights must be 1 positive"),
        ({"weights": (float("inf"),)}, InvalidProblemError, "must be 1 positive"),
        (
            {"traces": (long_trace(),) * 2, "weights": (1e308, 1e308)},
            InvalidProblemError,
            "weights must have a finite sum",
        ),
        (
            {"traces": (long_trace(),) * 2, "weights": (1e-13, 1)},
            InvalidProblemError,
            "none less than 1e-12 of the largest",
        ),
    ],
)
def test_senseless_workloads_are_refused(options, error, message):
    with pytest.raises(error, match=message):
        Workload(**{"traces": (long_trace(),), **options})


def test_no_tokens_take_no_time():
    empty = make_trace(np.zeros((0, 3, 2), np.int16), 8)
    topology = Topology(num_ranks=4, ranks_per_node=2)
    placement = random_placement(np.random.default_rng(0), empty, topology)
    workload = Workload(traces=(empty,), cost=COST)
    assert workload.seconds(placement) == 0
    assert [seconds.tolist() for seconds in workload.batch_seconds(placement)] == [[0]]


def test_traces_of_different_models_are_refused():
    other = make_trace(np.zeros((5, 3, 1), np.int16), 9)
    with pytest.raises(InvalidTraceError, match="traces are of different models"):
        Workload(traces=(long_trace(), other))


def test_a_problem_needs_the_workload_of_its_own_model():
    topology = Topology(num_ranks=2, ranks_per_node=2)
    problem = PlacementProblem.from_workload(Workload(traces=(long_trace(),)), topology)
    assert problem.objective is Objective.MODELLED_TIME
    other = make_trace(np.zeros((5, 3, 1), np.int16), 9)
    with pytest.raises(InvalidProblemError, match="the workload has 9 experts"):
        replace(problem, workload=Workload(traces=(other,)))


def test_replicas_may_be_timed_and_slots_are_kept():
    trace = long_trace()
    topology = Topology(num_ranks=4, ranks_per_node=2)
    problem = PlacementProblem.from_workload(
        Workload(traces=(trace,), cost=COST), topology, slots_per_rank=3
    )
    placement = random_placement(np.random.default_rng(0), trace, topology, 1)
    assert placement.has_replicas
    assert problem.objective_value(placement) > 0
    with pytest.raises(InvalidPlacementError, match="holds 3 experts on a rank"):
        replace(problem, slots_per_rank=2).objective_value(placement)
    with pytest.raises(InvalidPlacementError, match="no single rank"):
        replace(problem, objective=Objective.MAX_LOAD).objective_value(placement)


def test_a_placement_is_tallied_once_for_its_whole_and_its_layers(rng, monkeypatch):
    trace = make_trace(random_ids(rng, 60, 2, 8, 2), 8)
    topology = Topology(num_ranks=2, ranks_per_node=2)
    placement, other = (random_placement(rng, trace, topology, 1) for _ in range(2))
    fresh = [Workload(traces=(trace,)).seconds(p) for p in (placement, other)]
    tallied = []

    def counting(*arguments, **options):
        tallied.append(arguments[1])
        return tally(*arguments, **options)

    tally = workload_module.tally
    monkeypatch.setattr(workload_module, "tally", counting)
    workload = Workload(traces=(trace,))
    for _ in range(3):
        assert [workload.seconds(p) for p in (placement, other)] == fresh
        assert workload.layer_seconds(placement).sum() == pytest.approx(fresh[0])
    assert [id(p) for p in tallied] == [id(placement), id(other)]


def test_a_layers_price_is_made_once_for_a_machine(rng, monkeypatch):
    """A search prices thousands of placements; a workload on two machines has both."""
    trace = make_trace(random_ids(rng, 60, 2, 8, 2), 8)
    machines = [Topology(num_ranks=g, ranks_per_node=2) for g in (2, 4)]
    placements = [random_placement(rng, trace, m) for m in (*machines, *machines)]
    fresh = [Workload(traces=(trace,)).seconds(each) for each in placements]
    made, layer_price = [], CostModel.layer_price

    def counting(cost, topology):
        made.append(topology)
        return layer_price(cost, topology)

    monkeypatch.setattr(CostModel, "layer_price", counting)
    workload = Workload(traces=(trace,))
    assert [workload.seconds(each) for each in placements] == fresh
    assert made == machines
