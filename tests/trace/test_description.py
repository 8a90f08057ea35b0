import json

import numpy as np
import pytest
from moetuner.trace import CountTrace, TraceMetadata, read_trace
from moetuner.trace.description import describe
from strategies import make_trace
from zipf_trace import zipf_trace


def values(found):
    return (found.low, found.median, found.high)


def test_a_trace_described_by_hand():
    """Four tokens, three layers, two of four experts each.

    Layer 0 pairs {0,1}, {0,1}, {0,1}, {2,3}: loads 3,3,1,1 over a mean of 2.
    Layer 1 pairs {0,1}, {0,1}, {2,3}, {2,3}: loads 2,2,2,2.
    Layer 2 is layer 1 again.
    """
    halves = [[0, 1], [2, 3]]
    rows = [(0, 0, 0), (0, 0, 0), (0, 1, 1), (1, 1, 1)]
    ids = np.array([[halves[half] for half in row] for row in rows], np.int16)
    found = describe(
        make_trace(
            ids,
            4,
            sequence=np.array([5, 5, 8, 9], np.int32),
            metadata=TraceMetadata(model="m", source="s", dataset="d"),
        )
    )
    assert (found.model, found.source, found.dataset) == ("m", "s", "d")
    assert (found.num_tokens, found.num_sequences, found.layers) == (4, 3, (0, 1, 2))
    assert (found.num_experts, found.top_k, found.ranked) == (4, 2, False)
    assert (found.missing, found.unused_experts) == ((), 0)
    assert values(found.load_skew) == (1.0, 1.0, 1.5)
    # Layers 1 and 2: of 48 equally likely places (12 pairs of 4) only 4 are used: 3.
    # Layer 0: 01 and 10 have 3 of 8 counts where 9 of 44 are expected, 23 and 32 have
    # 1 of 8 where 1 of 44 is: 2*(3/8)*(3*44/(8*9)) + 2*(1/8)*(44/8).
    layer_0 = 2 * (3 / 8) * (3 * 44 / (8 * 9)) + 2 * (1 / 8) * (44 / 8)
    assert values(found.coactivation_lift) == pytest.approx(
        tuple(sorted((layer_0, 3.0, 3.0)))
    )
    # 0 -> 1: 64 expected in all, as 6 or 2 each; 16 counts: 0,1 -> 0,1 twice, 0,1 ->
    # 2,3 once, 2,3 -> 2,3 once, each for 4 pairs. Ratio = count/16 * 64/expected.
    step_0 = (4 * 2 * (2 * 4 / 6) + 4 * 1 * (1 * 4 / 6) + 4 * 1 * (1 * 4 / 2)) / 16
    # 1 -> 2: 0,1 -> 0,1 and 2,3 -> 2,3, twice each: half of all pairs, so lift 2.
    assert values(found.transition_lift) == pytest.approx((step_0, (step_0 + 2) / 2, 2))


def test_unused_experts_padding_and_gaps():
    """Expert 2 is never chosen; padding counts nowhere."""
    ids = np.array([[[0, -1], [1, 0]], [[0, 1], [1, -1]]], np.int16)
    trace = make_trace(ids, 3)
    assert describe(trace).unused_experts == 2
    assert describe(trace).unused_ids == ((2,), (2,))
    assert values(describe(trace).load_skew) == (2.0, 2.0, 2.0)
    assert describe(trace).consecutive_layers
    gapped = type(trace)(
        topk_ids=ids.copy(), num_experts=3, layer_ids=np.array([1, 3], np.int32)
    )
    assert not describe(gapped).consecutive_layers
    assert describe(gapped).layers == (1, 3)


def test_phases_are_counted_where_they_are_told():
    ids = np.zeros((5, 1, 1), np.int16)
    told = describe(make_trace(ids, 2, phase=np.array([0, 0, 0, 1, 1], np.uint8)))
    assert (told.prefill_tokens, told.decode_tokens) == (3, 2)
    silent = describe(make_trace(ids, 2))
    assert (silent.prefill_tokens, silent.decode_tokens) == (None, None)


def test_no_tokens_and_one_layer():
    empty = describe(make_trace(np.zeros((0, 1, 2), np.int16), 4))
    assert (empty.num_tokens, empty.unused_experts) == (0, 4)
    assert empty.coactivation_lift is empty.transition_lift is None


def test_counts_have_no_lifts():
    counts = np.array([[[4, 0], [1, 3]], [[2, 0], [2, 0]]])
    found = describe(
        CountTrace(
            counts=counts,
            num_tokens=np.array([4, 2]),
            layer_ids=np.array([0, 7], np.int32),
        )
    )
    assert found.missing == ("coactivation", "transitions")
    assert found.coactivation_lift is found.transition_lift is None
    assert (found.num_tokens, found.num_sequences, found.top_k) == (6, 2, 1)
    assert values(found.load_skew) == (1.0, 1.5, 2.0)
    assert found.unused_experts == 1


def test_lifts_tell_affinity_from_skew():
    """Skew alone lifts nothing; following partners lifts transitions only."""
    shape = {"num_tokens": 20000, "num_layers": 3, "num_experts": 8, "top_k": 1}
    skewed = describe(zipf_trace(**shape, skew=1))
    assert skewed.load_skew.low > 2
    assert skewed.transition_lift.high == pytest.approx(1, abs=0.02)
    # Half follow one of eight, the rest are even: 0.5625**2 * 8 + 7 * 0.0625**2 * 8.
    followed = describe(zipf_trace(**shape, affinity=0.5))
    assert values(followed.transition_lift) == pytest.approx((2.75,) * 3, rel=0.05)
    assert followed.load_skew.high < 1.1


def test_a_real_trace(traces_dir):
    trace = read_trace(traces_dir / "deepseek-v2-lite-esft" / "law.npz")
    found = describe(trace)
    assert (found.num_tokens, found.num_sequences) == (4252, 17)
    assert found.layers == tuple(range(1, 27))
    assert (found.num_experts, found.top_k, found.ranked) == (64, 6, True)
    loads = [
        np.bincount(layer.ravel(), minlength=64)
        for layer in trace.topk_ids.swapaxes(0, 1)
    ]
    skews = [load.max() / load.mean() for load in loads]
    expected = (min(skews), np.median(skews), max(skews))
    assert values(found.load_skew) == pytest.approx(expected)
    assert found.unused_experts == sum((load == 0).sum() for load in loads)
    assert found.coactivation_lift.low > 1
    assert found.transition_lift.low > 1
    assert json.loads(json.dumps(found.to_json()))["num_tokens"] == 4252
