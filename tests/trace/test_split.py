import re

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from moetuner.errors import InvalidTraceError
from moetuner.trace import (
    CountTrace,
    merge_traces,
    read_trace,
    select,
    split_by_sequence,
    subsample,
)
from strategies import full_traces, make_trace, random_ids
from zipf_trace import zipf_trace

SEEDS = st.integers(0, 2**32 - 1)
FRACTIONS = st.floats(0.01, 0.99)


@st.composite
def sequenced(draw):
    """Sequences of unequal length, interleaved, some perhaps without a token."""
    rng = np.random.default_rng(draw(SEEDS))
    names = rng.choice(1000, draw(st.integers(2, 6)), replace=False)
    sequence = rng.choice(names, 30, p=rng.dirichlet(np.ones(names.size)))
    sequence[:2] = names[:2]
    return make_trace(
        random_ids(rng, 30, 2, 8, 2),
        8,
        sequence=sequence.astype(np.int32),
        position=np.arange(30, dtype=np.int32),  # tells which token it was
    )


def tokens_of(trace):
    return trace.position.tolist()


@given(sequenced(), FRACTIONS, SEEDS)
def test_a_split_is_a_partition_into_whole_sequences(trace, fraction, seed):
    split = split_by_sequence(trace, fraction, seed)
    assert sorted(tokens_of(split.plan) + tokens_of(split.score)) == list(range(30))
    planned, scored = set(split.plan.sequence), set(split.score.sequence)
    assert planned
    assert scored
    assert not planned & scored
    for part in (split.plan, split.score):
        assert tokens_of(part) == sorted(tokens_of(part))  # order kept
        np.testing.assert_array_equal(part.topk_ids, trace.topk_ids[part.position])
        np.testing.assert_array_equal(part.sequence, trace.sequence[part.position])


@given(sequenced(), FRACTIONS, SEEDS)
def test_the_share_is_kept_to_within_one_sequence(trace, fraction, seed):
    longest = np.unique(trace.sequence, return_counts=True)[1].max()
    split = split_by_sequence(trace, fraction, seed)
    assert abs(split.plan.num_tokens - fraction * trace.num_tokens) <= longest


@given(sequenced(), FRACTIONS, SEEDS)
def test_a_seed_gives_one_split(trace, fraction, seed):
    one, other = (split_by_sequence(trace, fraction, seed) for _ in range(2))
    assert tokens_of(one.plan) == tokens_of(other.plan)


def test_seeds_give_different_splits():
    trace = zipf_trace(
        num_tokens=60, num_layers=1, num_experts=4, top_k=1, num_sequences=20
    )
    plans = {
        tuple(split_by_sequence(trace, 0.5, seed).plan.sequence) for seed in range(8)
    }
    assert len(plans) > 4


@pytest.mark.parametrize("seed", [-1, 1.5])
def test_a_seed_that_is_none_is_refused(seed):
    trace = make_trace(
        np.zeros((2, 1, 1), np.int16), 1, sequence=np.arange(2, dtype=np.int32)
    )
    for part in (split_by_sequence, subsample):
        with pytest.raises(InvalidTraceError, match=f"whole number >= 0, got {seed}"):
            part(trace, 1 if part is subsample else 0.5, seed=seed)


@pytest.mark.parametrize("fraction", [0.2, 0.5, 0.8])
def test_a_real_trace_splits_by_tokens(traces_dir, fraction):
    trace = read_trace(traces_dir / "gpt-oss-20b-fingerprinting" / "mmlu_pro.npz")
    share = split_by_sequence(trace, fraction).plan.num_tokens / trace.num_tokens
    assert share == pytest.approx(fraction, abs=0.03)


def bare(num_tokens=4, **fields):
    return make_trace(
        random_ids(np.random.default_rng(1), num_tokens, 2, 8, 2), 8, **fields
    )


@pytest.mark.parametrize(
    ("trace", "fraction", "message"),
    [
        (bare(sequence=np.arange(4, dtype=np.int32)), 0.0, "in (0, 1], got 0.0"),
        (bare(sequence=np.arange(4, dtype=np.int32)), 1.1, "in (0, 1], got 1.1"),
        (bare(sequence=np.arange(4, dtype=np.int32)), np.nan, "in (0, 1], got nan"),
    ],
)
def test_what_cannot_be_split_is_refused(trace, fraction, message):
    with pytest.raises(InvalidTraceError, match=re.escape(message)):
        split_by_sequence(trace, fraction)


def count_trace(num_groups):
    counts = np.random.default_rng(2).integers(0, 9, (num_groups, 2, 4))
    return CountTrace(
        counts=counts,
        num_tokens=counts[:, 0].sum(axis=1),
        layer_ids=np.arange(2, dtype=np.int32),
        labels=tuple(f"g{i}" for i in range(num_groups)),
    )


@given(st.integers(2, 9), FRACTIONS, SEEDS)
def test_groups_of_counts_split_whole(num_groups, fraction, seed):
    whole = count_trace(num_groups)
    split = split_by_sequence(whole, fraction, seed)
    rows = dict(zip(whole.labels, whole.counts.tolist(), strict=True))
    for part in (split.plan, split.score):
        assert part.counts.tolist() == [rows[label] for label in part.labels]
    assert {*split.plan.labels, *split.score.labels} == set(whole.labels)
    assert split.plan.num_groups + split.score.num_groups == num_groups


@pytest.mark.parametrize(
    ("trace", "fraction"),
    [
        (bare(), 0.5),
        (bare(sequence=np.full(4, 3, np.int32)), 0.5),
        (bare(0, sequence=np.zeros(0, np.int32)), 0.5),
        (bare(sequence=np.arange(4, dtype=np.int32)), 1.0),
        (count_trace(1), 0.5),
        (count_trace(3), 1.0),
    ],
)
def test_where_nothing_can_be_held_out_both_parts_are_everything(trace, fraction):
    split = split_by_sequence(trace, fraction)
    assert split.plan is trace
    assert split.score is trace
    assert not split.held_out


@given(SEEDS, FRACTIONS)
def test_answers_to_one_request_stay_on_one_side(seed, fraction):
    """They share the tokens of its prompt, which would else be scored on."""
    sequence = np.arange(12, dtype=np.int32).repeat(3)
    trace = bare(36, sequence=sequence, request=sequence // 4)
    split = split_by_sequence(trace, fraction, seed)
    assert split.held_out
    assert not {*split.plan.request} & {*split.score.request}
    assert {*split.plan.sequence} | {*split.score.sequence} == set(range(12))
    assert {*subsample(trace, 20, seed).request} <= {0, 1, 2}
    assert subsample(trace, 20, seed).num_sequences == 4


def test_requests_stay_distinct_when_traces_are_merged():
    request = np.array([4, 4, 7, 7], np.int32)
    trace = bare(4, sequence=np.arange(4, dtype=np.int32), request=request)
    merged = merge_traces([trace, trace])
    assert merged.request.tolist() == [0, 0, 1, 1, 2, 2, 3, 3]
    assert merged.num_sequences == 8


@given(full_traces(), st.data())
def test_select_keeps_every_field_of_the_chosen_tokens(trace, data):
    bits = st.lists(st.booleans(), min_size=trace.num_tokens, max_size=trace.num_tokens)
    mask = np.array(data.draw(bits), bool)
    part = select(trace, mask)
    assert part.arrays().keys() == trace.arrays().keys()
    for name, array in trace.arrays().items():
        kept = array if name == "layer_ids" else array[mask]
        np.testing.assert_array_equal(part.arrays()[name], kept)
    assert (part.metadata, part.ranked) == (trace.metadata, trace.ranked)


@pytest.mark.parametrize("mask", [np.ones(3, bool), np.arange(4)])
def test_select_wants_one_bit_per_token(mask):
    with pytest.raises(InvalidTraceError, match=r"token_mask must be bool \[4\], got"):
        select(bare(), mask)


@given(sequenced(), st.integers(1, 40), SEEDS)
def test_subsample_keeps_whole_sequences_within_the_limit(trace, max_tokens, seed):
    lengths = np.unique(trace.sequence, return_counts=True)[1]
    try:
        part = subsample(trace, max_tokens, seed)
    except InvalidTraceError:
        assert lengths.max() > max_tokens  # the one drawn first did not fit
        return
    assert 0 < part.num_tokens <= max_tokens
    whole = np.flatnonzero(np.isin(trace.sequence, part.sequence))
    assert tokens_of(part) == whole.tolist()
    assert tokens_of(part) == tokens_of(subsample(trace, max_tokens, seed))
    if max_tokens >= trace.num_tokens:
        assert part is trace


def test_subsample_refuses_less_than_a_sequence():
    trace = bare(sequence=np.array([0, 0, 1, 1], np.int32))
    with pytest.raises(InvalidTraceError, match="max_tokens=1 is less than one sequen"):
        subsample(trace, 1)


def test_subsample_needs_sequences_only_when_it_cuts():
    trace = bare()
    assert subsample(trace, 4) is trace
    with pytest.raises(InvalidTraceError, match="does not say which sequence"):
        subsample(trace, 3)


@given(st.lists(sequenced(), min_size=1, max_size=3))
def test_merged_sequences_stay_distinct(traces):
    """Tokens of two sources share a sequence exactly when they did before."""
    merged = merge_traces(traces)
    np.testing.assert_array_equal(
        merged.topk_ids, np.concatenate([trace.topk_ids for trace in traces])
    )
    owners = [(i, s) for i, trace in enumerate(traces) for s in trace.sequence.tolist()]
    pairs = set(zip(owners, merged.sequence.tolist(), strict=True))
    assert len(pairs) == len(set(owners)) == merged.num_sequences


def test_a_field_survives_when_every_trace_has_it():
    phase = np.zeros(4, np.uint8)
    sequence = np.arange(4, dtype=np.int32)
    both = bare(phase=phase, sequence=sequence, ranked=True)
    merged = merge_traces([both, bare(phase=phase)])
    assert merged.arrays().keys() == {"topk_ids", "layer_ids", "phase"}
    assert not merged.ranked
    assert merge_traces([both, both]).ranked


def other_layers():
    return make_trace(random_ids(np.random.default_rng(0), 4, 3, 8, 2), 8)


@pytest.mark.parametrize(
    ("other", "message"),
    [
        (make_trace(bare().topk_ids.copy(), 9), "9 experts, top-2, layers [0, 1]"),
        (other_layers(), "8 experts, top-2, layers [0, 1, 2]"),
        (make_trace(bare().topk_ids[..., :1].copy(), 8), "8 experts, top-1, layers"),
    ],
)
def test_traces_of_different_models_do_not_merge(other, message):
    with pytest.raises(InvalidTraceError, match=re.escape(message)) as caught:
        merge_traces([bare(), other])
    assert "differ in shape: 8 experts, top-2, layers [0, 1] and" in str(caught.value)


def test_nothing_to_merge():
    with pytest.raises(InvalidTraceError, match="wanted at least one trace, got none"):
        merge_traces([])
