"""Shared experts among the routed ones, and dummy batches, are pointed out."""

import numpy as np
import pytest
from moetuner.trace import CountTrace
from moetuner.trace.counts import counted
from moetuner.trace.description import describe
from moetuner.trace.hints import TraceHints, hints_of
from strategies import make_trace


def routed(rng, tokens, layers=3, experts=16, k=4):
    return np.argsort(rng.random((tokens, layers, experts)))[..., :k].astype(np.int16)


def with_shared(ids, expert):
    shared = np.full((*ids.shape[:2], 1), expert, np.int16)
    return np.ascontiguousarray(np.concatenate([ids, shared], axis=2))


def test_an_expert_in_every_row_is_a_shared_one(rng):
    trace = make_trace(with_shared(routed(rng, 500), 16), 17)
    (hint,) = hints_of(trace)
    assert "every token has expert 16 at 3 layers" in hint
    assert describe(trace).hints == (hint,)
    assert hints_of(make_trace(routed(rng, 500), 16)) == ()


@pytest.mark.parametrize("top_k", [None, 5])
def test_counts_show_it_too(rng, top_k):
    ids = with_shared(routed(rng, 800), 16).reshape(2, 400, 3, 5)
    counts = np.array(
        [[np.bincount(group[:, layer].ravel(), minlength=17) for layer in range(3)]
         for group in ids]
    )  # fmt: skip
    (hint,) = hints_of(counted(counts, top_k=top_k))
    assert "expert 16 at 3 layers" in hint
    assert hints_of(counted(counts[:, :, :16], top_k=top_k and 4)) == ()


def test_top_1_has_no_shared_expert():
    counts = np.array([[[500, 0], [500, 0]]])
    assert hints_of(counted(counts, top_k=1)) == ()


@pytest.mark.parametrize("scattered", [False, True])
def test_many_identical_rows_are_dummy_batches(rng, scattered):
    ids = np.concatenate([np.tile(routed(rng, 1), (300, 1, 1)), routed(rng, 2000)])
    if scattered:
        ids = rng.permutation(ids)
    sequence = (np.arange(len(ids)) // 50).astype(np.int32)
    (hint,) = hints_of(make_trace(ids, 16, sequence=sequence))
    assert hint.startswith("13.0% of the tokens")
    assert "dummy batches" in hint


def test_the_same_first_token_of_every_sequence_is_none(rng):
    ids = routed(rng, 4000)
    sequence = (np.arange(4000) // 20).astype(np.int32)
    ids[::20] = ids[0]
    assert hints_of(make_trace(ids, 16, sequence=sequence)) == ()


def test_blocks_add_up(rng):
    ids = with_shared(routed(rng, 600), 16)
    hints = TraceHints()
    for start in range(0, 600, 7):
        hints.add(make_trace(ids[start : start + 7], 17))
    assert hints.texts() == hints_of(make_trace(ids, 17))


def test_few_tokens_show_nothing(rng):
    assert hints_of(make_trace(with_shared(routed(rng, 30), 16), 17)) == ()
    few = CountTrace(
        counts=np.full((1, 2, 4), 3),
        num_tokens=np.array([12]),
        layer_ids=np.arange(2, dtype=np.int32),
    )
    assert hints_of(few) == ()


def test_large_blocks_are_sampled(rng):
    ids = np.tile(routed(rng, 10_000), (3, 1, 1))
    ids[:6000] = ids[0]
    shared = with_shared(ids, 16)
    trace = make_trace(shared, 17, sequence=(np.arange(30_000) // 100).astype(np.int32))
    every, dummies = hints_of(trace)
    assert "expert 16" in every
    assert dummies.startswith("20.0%")


def test_counts_that_are_alike_or_rise_by_chance_hint_at_nothing():
    """Without top-k: the same share 1/k is no sign where another expert has more."""
    for row in ([10, 20, 30, 40], [100] * 4, [25, 25, 25, 25], [50, 30, 15, 5]):
        counts = np.tile(row, (3, 2, 1)).astype(np.int64)
        layer_ids = np.arange(2, dtype=np.int32)
        hints = hints_of(counted(counts, layer_ids=layer_ids))
        assert (hints != ()) == (row[0] == 50)


def test_a_top_k_that_is_too_large_is_told_by_its_sums():
    counts = np.array([[[1000, 0, 0, 0], [250, 250, 250, 250]]])
    layer_ids = np.array([3, 5], np.int32)
    (hint,) = hints_of(counted(counts, layer_ids=layer_ids, top_k=4))
    assert hint.startswith("expert 0 at layer 3 has more choices than a layer has")
    assert "`top_k` is too large" in hint
