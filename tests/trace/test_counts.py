"""Counts: layers that counted, tokens by top-k, and top-k never guessed."""

import numpy as np
import pytest
from moetuner.errors import InvalidTraceError
from moetuner.trace import read_trace, with_top_k, write_trace
from moetuner.trace.counts import counted
from moetuner.trace.description import describe
from strategies import make_trace

COUNTS = np.zeros((3, 4, 5), np.int64)
COUNTS[0, 2], COUNTS[0, 3] = [4, 0, 4, 0, 0], [1, 2, 3, 1, 1]
COUNTS[2, 2], COUNTS[2, 3] = [0, 5, 0, 0, 1], [0, 0, 0, 0, 5]


def test_layers_and_groups_of_nothing_are_left_out():
    trace = counted(COUNTS, top_k=4, labels=("a", "b", "c"))
    assert trace.layer_ids.tolist() == [2, 3]
    assert trace.labels == ("a", "c")
    assert trace.num_tokens.tolist() == [2, 2]  # 8 / 4, and 6 / 4 rounded up
    assert trace.top_k == 4


def test_top_k_is_given_or_unknown(tmp_path):
    trace = counted(COUNTS)
    assert trace.top_k is None
    assert trace.num_tokens.tolist() == [8, 6]  # choices
    write_trace(trace, tmp_path / "t")
    again = read_trace(tmp_path / "t")
    assert again.top_k is None
    assert again.num_tokens.tolist() == [8, 6]
    assert read_trace(tmp_path / "t", top_k=2).num_tokens.tolist() == [4, 3]
    description = describe(again)
    assert description.top_k is None
    assert not description.tokens_known
    assert description.unused_per_layer == (1, 0)


def test_tokens_that_were_recorded_stay():
    trace = counted(COUNTS, num_tokens=np.array([4, 0, 3]), top_k=2)
    assert trace.num_tokens.tolist() == [4, 3]
    assert trace.top_k == 2
    assert with_top_k(trace, 2) is trace
    with pytest.raises(InvalidTraceError, match="says 2 experts per token"):
        with_top_k(trace, 3)


def test_a_trace_of_tokens_says_its_own_top_k(rng):
    trace = make_trace(np.zeros((2, 1, 1), np.int16), 4)
    assert with_top_k(trace, 1) is trace
    assert with_top_k(trace, None) is trace
    with pytest.raises(InvalidTraceError, match="says 1 experts per token"):
        with_top_k(trace, 2)


@pytest.mark.parametrize(
    ("counts", "fields", "message"),
    [
        (COUNTS * 0, {}, "counted nothing"),
        (COUNTS - 1, {}, ">= 0"),
        (COUNTS[0], {}, "none of them empty"),
        (COUNTS, {"top_k": 6}, "counts are of 5 experts"),
        (COUNTS, {"num_tokens": np.arange(2)}, r"tokens must be \[3\]"),
        (COUNTS, {"labels": ("a",)}, "1 labels for 3 groups"),
    ],
)
def test_what_does_not_fit_is_refused(counts, fields, message):
    with pytest.raises(InvalidTraceError, match=message):
        counted(counts, **fields)
