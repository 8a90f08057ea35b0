"""Rows that nobody wrote, by one rule for one expert per token and for more."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from moetuner.trace.unwritten import routing_layers, without_unwritten


@given(st.integers(1, 20), st.integers(1, 4), st.integers(1, 3), st.integers(0, 2**16))
def test_the_rule(tokens, layers, k, seed):
    rng = np.random.default_rng(seed)
    ids = np.argsort(rng.random((tokens, layers, 6)))[..., :k].astype(np.int16)
    ids[rng.random((tokens, layers)) < 0.3] = 0
    ids[rng.random(tokens) < 0.3] = 0
    found = without_unwritten(ids, layers)
    for token in range(tokens):
        zero = (ids[token] == 0).all(axis=1)
        for layer in range(layers):
            unwritten = zero[layer] if k > 1 else zero.all() and layers > 1
            wanted = [-1] * k if unwritten else ids[token, layer].tolist()
            assert found[token, layer].tolist() == wanted


def test_dense_layers_do_not_count_for_one_expert_per_token():
    """A single routing layer beside dense ones leaves expert 0 what it is."""
    ids = np.array([[[0], [0]], [[0], [3]]], np.int16)
    assert routing_layers(ids).tolist() == [False, True]
    assert without_unwritten(ids).tolist() == ids.tolist()
    both = np.array([[[0], [0]], [[2], [3]]], np.int16)
    assert without_unwritten(both).tolist() == [[[-1], [-1]], [[2], [3]]]


@pytest.mark.parametrize("k", [1, 2])
def test_the_original_stays(k):
    ids = np.zeros((2, 2, k), np.int16)
    without_unwritten(ids, 2)
    assert not ids.any()
