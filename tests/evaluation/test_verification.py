"""Predictions against counters that a plain loop over tokens makes; files; refusals."""

import dataclasses

import numpy as np
import pytest
from counted_run import count, make_run, record_of
from hypothesis import given
from hypothesis import strategies as st
from moetuner.errors import InvalidPlacementError, InvalidTraceError
from moetuner.evaluation.verify import (
    column_names,
    predict,
    read_record,
    verify,
    write_record,
)
from moetuner.placement.model import Placement
from moetuner.placement.topology import Topology
from strategies import random_placement, topologies


@given(topology=topologies, extra=st.integers(0, 2), seed=st.integers(0, 2**32 - 1))
def test_prediction_equals_a_count_token_by_token(topology, extra, seed):
    """Replicas take turns by row, so their turns begin again with every step."""
    rng = np.random.default_rng(seed)
    trace = make_run(rng, topology.num_ranks)
    placement = random_placement(rng, trace, topology, extra)
    assert np.array_equal(predict(trace, placement), count(trace, placement))
    record = record_of(count(trace, placement), placement)
    assert verify(trace, placement, record) == []


def test_long_turns_take_no_more_memory(rng, monkeypatch):
    """54 ranks, experts with 2, 3, 5, ... 53 replicas: turns of 3e19 rows."""
    primes = [p for p in range(2, 54) if all(p % q for q in range(2, p))]
    slots = [
        [expert if rank < count else -1 for expert, count in enumerate(primes)]
        for rank in range(54)
    ]
    placement = Placement(
        slot_experts=np.array(slots, np.int32).reshape(1, -1),
        layer_ids=np.zeros(1, np.int32),
        num_experts=len(primes),
        topology=Topology(num_ranks=54, ranks_per_node=54),
    )
    trace = make_run(rng, 54, len(primes), num_layers=1)
    assert np.array_equal(predict(trace, placement), count(trace, placement))
    for most in (1, 4, 30):
        monkeypatch.setattr("moetuner.evaluation.verify.MOST_ROWS", most)
        assert np.array_equal(predict(trace, placement), count(trace, placement))
        small = make_run(rng, 4)
        topology = Topology(num_ranks=4, ranks_per_node=2)
        replicated = random_placement(rng, small, topology, 2)
        assert np.array_equal(predict(small, replicated), count(small, replicated))


@pytest.fixture
def run(rng):
    topology = Topology(num_ranks=4, ranks_per_node=2)
    trace = make_run(rng, 4)
    return trace, random_placement(rng, trace, topology, 1)


def test_each_difference_is_named(run):
    trace, placement = run
    counts = count(trace, placement)
    counts[1, 2, 3] += 5
    (found,) = verify(trace, placement, record_of(counts, placement))
    predicted = int(counts[1, 2, 3]) - 5
    assert str(found) == (
        f"layer 1, rank 2: rows to rank 2: predicted {predicted}, counted "
        f"{predicted + 5}"
    )
    names = column_names(placement.topology, placement.num_slots)
    assert len(names) == counts.shape[2]
    assert names[5] == "rows to node 0"


def test_files_bring_everything_back(run, tmp_path):
    trace, placement = run
    record = record_of(count(trace, placement), placement)
    write_record(record, tmp_path / "counters.safetensors")
    back = read_record(tmp_path / "counters.safetensors")
    assert np.array_equal(back.counts, record.counts)
    assert np.array_equal(back.layer_ids, record.layer_ids)
    assert back.placement_fingerprint == record.placement_fingerprint


def test_what_does_not_belong_together_is_refused(run, tmp_path):
    trace, placement = run
    record = record_of(count(trace, placement), placement)
    other = Placement(
        slot_experts=placement.slot_experts[:, ::-1].copy(),
        layer_ids=placement.layer_ids,
        num_experts=placement.num_experts,
        topology=placement.topology,
    )
    with pytest.raises(InvalidPlacementError, match="counters are of another placem"):
        verify(trace, other, record)
    with pytest.raises(InvalidTraceError, match=r"counters \[1, 4"):
        few = dataclasses.replace(
            record, counts=record.counts[:1], layer_ids=record.layer_ids[:1]
        )
        verify(trace, placement, few)
    for name in ("home_rank", "sequence", "position"):
        with pytest.raises(InvalidTraceError, match="must say home_rank"):
            predict(dataclasses.replace(trace, **{name: None}), placement)
    with pytest.raises(InvalidTraceError, match="home_rank 7 in the trace"):
        far = np.full(trace.num_tokens, 7, np.int16)
        predict(dataclasses.replace(trace, home_rank=far), placement)
    with pytest.raises(InvalidTraceError, match=r"must be 0, 1, \.\.\. in position"):
        same = np.zeros(trace.num_tokens, np.int32)
        predict(dataclasses.replace(trace, position=same), placement)
    with pytest.raises(InvalidTraceError, match="counts must be int64"):
        dataclasses.replace(record, counts=record.counts.astype(np.int32))
    with pytest.raises(InvalidTraceError, match=r"layer_ids must be int32 \[2\]"):
        dataclasses.replace(record, layer_ids=record.layer_ids[:1])
    from moetuner.trace import write_trace

    write_trace(trace, tmp_path / "trace.safetensors")
    with pytest.raises(InvalidTraceError, match="not a counters file: its format"):
        read_record(tmp_path / "trace.safetensors")
    (tmp_path / "torn").write_bytes(b"torn")
    with pytest.raises(InvalidTraceError, match="not a counters file"):
        read_record(tmp_path / "torn")
