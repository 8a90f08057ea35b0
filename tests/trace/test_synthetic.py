import re

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from moetuner.errors import InvalidTraceError
from moetuner.trace import synthetic_trace
from moetuner.trace.description import describe

SHAPE = {"num_tokens": 4000, "num_layers": 3, "num_experts": 16, "top_k": 1}
SEEDS = st.integers(0, 2**32 - 1)
# Six standard deviations: no seed that Hypothesis can find leaves this.
SIGMAS = 6


@given(
    num_tokens=st.integers(1, 40),
    num_layers=st.integers(1, 4),
    num_experts=st.integers(1, 12),
    skew=st.floats(0, 5),
    affinity=st.floats(0, 1),
    seed=SEEDS,
    data=st.data(),
)
def test_any_legal_arguments_give_a_legal_trace(
    num_tokens, num_layers, num_experts, skew, affinity, seed, data
):
    arguments = {
        "num_tokens": num_tokens,
        "num_layers": num_layers,
        "num_experts": num_experts,
        "top_k": data.draw(st.integers(1, num_experts)),
        "num_sequences": data.draw(st.integers(1, num_tokens)),
        "skew": skew,
        "affinity": affinity,
        "seed": seed,
    }
    trace = synthetic_trace(**arguments)
    assert trace.topk_ids.shape == (num_tokens, num_layers, arguments["top_k"])
    assert trace.topk_ids.min() >= 0
    lengths = np.bincount(trace.sequence, minlength=arguments["num_sequences"])
    assert lengths.size == arguments["num_sequences"]
    assert lengths.max() - lengths.min() <= 1
    assert (np.diff(trace.sequence) >= 0).all()
    places = [place for length in lengths for place in range(length)]
    assert trace.position.tolist() == places
    assert synthetic_trace(**arguments).sha256() == trace.sha256()


def zipf(skew):
    share = np.arange(1, 17.0) ** -skew
    return share / share.sum()


@settings(max_examples=20)
@given(SEEDS, st.sampled_from([0.0, 0.5, 1.0, 2.0]), st.sampled_from([0.0, 0.6]))
def test_loads_follow_zipfs_law_whatever_the_affinity(seed, skew, affinity):
    """With top-1; of more choices no simple law is known."""
    trace = synthetic_trace(**SHAPE, skew=skew, affinity=affinity, seed=seed)
    share = zipf(skew)
    spread = np.sqrt(share * (1 - share) / SHAPE["num_tokens"])
    for layer in range(SHAPE["num_layers"]):
        load = np.bincount(trace.topk_ids[:, layer, 0], minlength=16)
        # Which expert is the r-th most popular is the layer's own; largest first.
        off = np.abs(np.sort(load)[::-1] / SHAPE["num_tokens"] - share)
        assert (off <= SIGMAS * spread).all()


def test_more_skew_is_more_skew_for_any_top_k():
    shape = SHAPE | {"top_k": 4}
    skews = [
        describe(synthetic_trace(**shape, skew=skew)).load_skew.median
        for skew in (0.0, 0.5, 1.0, 2.0)
    ]
    assert skews == sorted(skews)
    assert skews[0] < 1.2
    assert skews[-1] > 3


@settings(max_examples=20)
@given(
    SEEDS, st.sampled_from([0.0, 1.0, 2.0]), st.sampled_from([0.0, 0.1, 0.5, 0.9, 1.0])
)
def test_affinity_is_the_probability_to_follow_the_partner(seed, skew, affinity):
    """Beyond those that are drawn anew and hit the partner by chance."""
    every = synthetic_trace(**SHAPE, affinity=1, seed=seed).topk_ids[..., 0]
    ids = synthetic_trace(**SHAPE, skew=skew, affinity=affinity, seed=seed).topk_ids
    by_chance = (zipf(skew) ** 2).sum()
    expected = affinity + (1 - affinity) * by_chance
    spread = np.sqrt(expected * (1 - expected) / SHAPE["num_tokens"])
    for layer in range(2):
        partner = np.full(16, -1)
        partner[every[:, layer]] = every[:, layer + 1]
        assert sorted(partner) == list(range(16))  # one partner each
        follows = (partner[ids[:, layer, 0]] == ids[:, layer + 1, 0]).mean()
        assert abs(follows - expected) <= SIGMAS * spread


def test_whole_rows_follow_their_partners():
    shape = SHAPE | {"top_k": 4}
    ids = synthetic_trace(**shape, affinity=1, skew=1).topk_ids
    for layer in range(2):
        partner = np.full(16, -1)
        partner[ids[:, layer]] = ids[:, layer + 1]
        np.testing.assert_array_equal(partner[ids[:, layer]], ids[:, layer + 1])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_tokens": 0}, "num_tokens >= 1, got 0"),
        ({"num_layers": 0}, "num_layers >= 1, got 0"),
        ({"top_k": 0}, "top_k in 1..16 (num_experts), got 0"),
        ({"top_k": 17}, "top_k in 1..16 (num_experts), got 17"),
        ({"num_sequences": 0}, "num_sequences in 1..4000 (num_tokens), got 0"),
        ({"num_sequences": 4001}, "num_sequences in 1..4000 (num_tokens), got 4001"),
        ({"skew": -0.1}, "skew finite and >= 0, got -0.1"),
        ({"skew": float("inf")}, "skew finite and >= 0, got inf"),
        ({"affinity": 1.1}, "affinity in [0, 1], got 1.1"),
        ({"affinity": float("nan")}, "affinity in [0, 1], got nan"),
        ({"num_experts": 40000}, "num_experts in 1..32767, got 40000"),
    ],
)
def test_arguments_that_make_no_sense_are_refused(changes, message):
    with pytest.raises(InvalidTraceError, match=re.escape(message)):
        synthetic_trace(**SHAPE | changes)
