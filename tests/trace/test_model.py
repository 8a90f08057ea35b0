import re

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from moetuner.errors import InvalidTraceError
from moetuner.trace import CountTrace, Trace, TraceMetadata
from strategies import full_traces, traces

IDS = np.array([[[0, 1], [2, 3]], [[3, 0], [1, -1]], [[1, 2], [0, 3]]], np.int16)


def trace_with(**changes):
    """Three tokens, two layers, top-2 of four experts, all fields there."""
    fields = {
        "topk_ids": IDS.copy(),
        "num_experts": 4,
        "layer_ids": np.array([1, 4], np.int32),
        "topk_weights": np.full(IDS.shape, 0.5, np.float32),
        "sequence": np.array([7, 7, 9], np.int32),
        "position": np.array([0, 1, 0], np.int32),
        "home_rank": np.array([0, 1, 0], np.int16),
        "phase": np.array([0, 1, 1], np.uint8),
    }
    return Trace(**fields | changes)


def changed(array, index, value):
    copy = np.array(array)
    copy[index] = value
    return copy


W = np.full(IDS.shape, 0.5, np.float32)
I32, I16 = np.int32, np.int16

REFUSED = [
    # the ids themselves
    ("topk_ids", IDS.astype(np.int64), "topk_ids must be int16 [tokens, layers, top"),
    ("topk_ids", IDS.astype(">i2"), "got >i2 [3, 2, 2]"),
    ("topk_ids", IDS[0], "got int16 [2, 2]"),
    ("topk_ids", IDS.tolist(), "C-contiguous, got a list"),
    ("topk_ids", IDS[:, :, ::-1], "C-contiguous"),
    ("topk_ids", IDS[:, :0], "at least one layer"),
    ("topk_ids", np.ascontiguousarray(IDS[:, :, :0]), "one expert per token"),
    ("topk_ids", changed(IDS, (1, 0, 1), 4), "id 4 at token 1, layer column 0"),
    ("topk_ids", changed(IDS, (2, 1, 0), -2), "id -2 at token 2, layer column 1"),
    ("topk_ids", changed(IDS, (2, 1, 0), 3), "token 2 lists expert 3 twice at layer"),
    ("num_experts", 0, "num_experts must be 1..32767, got 0"),
    ("num_experts", 32768, "num_experts must be 1..32767, got 32768"),
    ("num_experts", 4.0, "num_experts must be a whole number, got 4.0"),
    ("num_experts", True, "num_experts must be a whole number, got True"),
    # layer numbers
    ("layer_ids", np.array([1], I32), "layer_ids must be int32 [2]"),
    ("layer_ids", np.array([1, 2], np.int64), "got int64 [2]"),
    ("layer_ids", np.array([4, 4], I32), "strictly increasing, got [4, 4]"),
    ("layer_ids", np.array([4, 1], I32), "strictly increasing, got [4, 1]"),
    ("layer_ids", np.array([-1, 1], I32), ">= 0 and strictly increasing, got [-1, 1]"),
    ("layer_ids", np.array([2**31 - 1, -(2**31)], I32), "strictly increasing"),
    # weights
    ("topk_weights", W[:2], "topk_weights must be float16 or float32 [3, 2, 2]"),
    ("topk_weights", W.astype(np.float64), "got float64 [3, 2, 2]"),
    ("topk_weights", W.astype(np.int32), "got int32 [3, 2, 2]"),
    ("topk_weights", changed(W, (1, 0, 1), np.nan), "got nan at token 1, layer col"),
    ("topk_weights", changed(W, (0, 1, 0), np.inf), "got inf at token 0, layer col"),
    ("topk_weights", changed(W, (2, 1, 1), -0.5), "got -0.5 at token 2, layer column"),
    # one value per token
    ("sequence", np.zeros(2, I32), "sequence must be int32 [3], one per token, got"),
    ("sequence", np.zeros(3, np.int64), "sequence must be int32 [3]"),
    ("sequence", np.array([0, -1, 0], I32), "sequence must be >= 0, got -1"),
    ("position", np.zeros(4, I32), "position must be int32 [3]"),
    ("position", np.array([0, 1, -5], I32), "position must be >= 0, got -5"),
    ("home_rank", np.zeros((3, 1), I16), "home_rank must be int16 [3]"),
    ("home_rank", np.zeros(3, I32), "got int32 [3]"),
    ("home_rank", np.array([0, -1, 0], I16), "home_rank must be >= 0, got -1"),
    ("phase", np.zeros(3, np.bool_), "phase must be uint8 [3]"),
    ("phase", np.array([0, 1, 2], np.uint8), "0 (prefill) or 1 (decode), got 2"),
]


@pytest.mark.parametrize(("field", "value", "message"), REFUSED)
def test_a_bad_field_is_refused_by_name(field, value, message):
    with pytest.raises(InvalidTraceError, match=re.escape(message)):
        trace_with(**{field: value})


def test_ranked_rows_must_fall():
    rising = changed(W, (1, 1, 1), 0.75)
    assert not trace_with(topk_weights=rising).ranked
    with pytest.raises(InvalidTraceError, match="ranked=True needs each row's weights"):
        trace_with(topk_weights=rising, ranked=True)


def test_padding_may_repeat():
    ids = changed(IDS, (0, 0), -1)
    assert trace_with(topk_ids=ids).topk_ids[0, 0].tolist() == [-1, -1]


def test_a_very_wide_row_is_checked_too():
    """The check for repeated experts does not slow down with the square of top-k."""
    ids = np.arange(30000, dtype=np.int16).reshape(1, 1, -1)
    layer = np.zeros(1, np.int32)
    assert Trace(topk_ids=ids.copy(), num_experts=30000, layer_ids=layer).top_k == 30000
    twice = changed(ids, (0, 0, 0), 29999)
    with pytest.raises(InvalidTraceError, match="lists expert 29999 twice"):
        Trace(topk_ids=twice, num_experts=30000, layer_ids=layer)


@given(traces(), st.data())
def test_any_id_out_of_range_is_refused(trace, data):
    if not trace.num_tokens:
        return
    place = tuple(data.draw(st.integers(0, n - 1)) for n in trace.topk_ids.shape)
    low, high = st.integers(-(2**15), -2), st.integers(trace.num_experts, 2**15 - 1)
    bad = changed(trace.topk_ids, place, data.draw(low | high))
    with pytest.raises(InvalidTraceError, match="is outside"):
        Trace(topk_ids=bad, num_experts=trace.num_experts, layer_ids=trace.layer_ids)


def test_arrays_cannot_be_written_to():
    trace = trace_with()
    for array in trace.arrays().values():
        with pytest.raises(ValueError, match="read-only"):
            array[...] = 0


def test_the_callers_own_array_stays_writeable():
    ids = np.array([[[0, 1]]], np.int16)
    Trace(topk_ids=ids, num_experts=2, layer_ids=np.array([0], np.int32))
    ids[...] = 0


def test_properties_count():
    trace = trace_with()
    sizes = (trace.num_tokens, trace.num_layers, trace.top_k, trace.num_sequences)
    assert sizes == (3, 2, 2, 2)
    assert trace_with(sequence=None).num_sequences == 0


@given(full_traces())
def test_sha256_sees_the_routing_and_nothing_else(trace):
    def rebuilt(ids=trace.topk_ids, layers=trace.layer_ids, more=0):
        return Trace(
            topk_ids=ids.copy(), layer_ids=layers, num_experts=trace.num_experts + more
        ).sha256()

    assert rebuilt() == trace.sha256()
    assert rebuilt(more=1) != trace.sha256()
    assert rebuilt(layers=trace.layer_ids + np.int32(1)) != trace.sha256()
    if (trace.topk_ids >= 0).any():
        used = tuple(np.argwhere(trace.topk_ids >= 0)[0])
        assert rebuilt(ids=changed(trace.topk_ids, used, -1)) != trace.sha256()


def test_sha256_stays_what_it_is():
    """Reports carry this hash, so a new version must not change it."""
    assert trace_with().sha256() == (
        "19621107909c87d3c239c702a23100a507306fe38a9e46e1993d38b5350c58c0"
    )


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model": 3}, "TraceMetadata: model must be text, got int"),
        ({"extra": {"a": None}}, "extra 'a' must be text, got NoneType"),
        ({"dataset": "\ud800"}, "dataset is not Unicode text"),
    ],
)
def test_metadata_is_text(changes, message):
    with pytest.raises(InvalidTraceError, match=re.escape(message)):
        TraceMetadata(**changes)


def counts_with(**changes):
    """Two groups, three layers, four experts."""
    fields = {
        "counts": np.ones((2, 3, 4), np.int64),
        "num_tokens": np.array([2, 2]),
        "layer_ids": np.array([0, 7, 15], np.int32),
        "labels": ("code", "law"),
    }
    return CountTrace(**fields | changes)


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        (
            "counts",
            np.ones((2, 3, 4)),
            "counts must be int64 [groups, layers, experts]",
        ),
        ("counts", np.ones((3, 4), np.int64), "got int64 [3, 4]"),
        ("counts", np.ones((2, 0, 4), np.int64), "none of them empty"),
        ("counts", np.full((2, 3, 4), -1), "counts must be >= 0, got -1"),
        ("counts", np.full((2, 3, 4), 2**62), "counts must add up to at most 2**53"),
        ("num_tokens", np.array([2]), "num_tokens must be int64 [2], one per group"),
        ("num_tokens", np.array([2.0, 2.0]), "got float64 [2]"),
        ("num_tokens", np.array([2, -3]), "num_tokens must be >= 0, got -3"),
        ("layer_ids", np.arange(2, dtype=np.int32), "layer_ids must be int32 [3]"),
        ("labels", ("code",), "1 labels for 2 groups"),
        ("labels", ("code", "\udfff"), "label is not Unicode text"),
    ],
)
def test_bad_counts_are_refused(field, value, message):
    with pytest.raises(InvalidTraceError, match=re.escape(message)):
        counts_with(**{field: value})


def test_counts_say_what_they_cannot_give():
    counts = counts_with()
    assert counts.missing == ("coactivation", "transitions")
    sizes = (counts.num_groups, counts.num_layers, counts.num_experts, counts.top_k)
    assert sizes == (2, 3, 4, 2)
    assert counts.sha256() == counts_with(labels=()).sha256()
    assert counts.sha256() != counts_with(counts=np.full((2, 3, 4), 2)).sha256()
