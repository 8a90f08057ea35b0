"""Arrays without a name: one meaning is taken, several are refused by name."""

import numpy as np
import pytest
from moetuner.errors import InvalidTraceError
from moetuner.trace.shapes import Meaning, check_layers, judge, plausible_loads

RNG = np.random.default_rng(5)


def ids(*shape, experts=64):
    *rows, k = shape
    return np.argsort(RNG.random((*rows, experts)), axis=-1)[..., :k]


def even_loads(groups, layers, experts, tokens=1000):
    chances = RNG.dirichlet(np.ones(experts), (groups, layers))
    return np.array([[RNG.multinomial(tokens, p) for p in group] for group in chances])


def persistent(groups, layers, experts):
    """Loads of unequal layers, alike from group to group."""
    base = RNG.gamma(1.0, 50, (1, layers, experts))
    return base * RNG.uniform(0.9, 1.1, (groups, layers, experts))


SOFTMAX = RNG.dirichlet(np.ones(64), 500).astype(np.float32)


@pytest.mark.parametrize(
    ("array", "meaning"),
    [
        (even_loads(1, 6, 32)[0], Meaning.LOADS),
        (RNG.integers(0, 200, (2, 12)), Meaning.LOADS),
        (even_loads(1, 32, 8)[0], Meaning.LOADS),  # more layers than experts
        (even_loads(20, 4, 32), Meaning.LOADS),
        (persistent(20, 4, 32), Meaning.LOADS),
        (np.rint(persistent(9, 4, 32)).astype(int), Meaning.LOADS),
        (ids(50, 4, 2).astype(np.uint8), Meaning.EXPERTS),
        (ids(50, 4, 2, experts=300).astype(np.uint16), Meaning.EXPERTS),
        (np.zeros((2, 3)), Meaning.LOADS),  # refused later: nothing was counted
    ],
)
def test_one_meaning_is_taken(array, meaning):
    assert judge(array, array.shape) is meaning


@pytest.mark.parametrize(
    ("array", "choices"),
    [
        (ids(500, 6, 4), ["routed-arrays", "eplb"]),
        (ids(500, 6, 4).astype(np.float32), ["routed-arrays", "eplb"]),
        (ids(500, 6).astype(np.float64), ["routed-arrays"]),
        (ids(4, 16, experts=16), ["import-placement", "eplb"]),
        (ids(4, 16, experts=16).astype(float), ["import-placement", "eplb"]),
        (np.hstack([ids(4, 16, experts=16)] * 2)[:, :20], ["import-placement", "eplb"]),
        (ids(100, 6, 4), ["routed-arrays", "eplb", "rank-loads"]),
        (RNG.integers(0, 99, (6, 8, 4)), ["eplb", "rank-loads"]),
        (ids(5000, 8), ["routed-arrays"]),
        (ids(100, 8), ["eplb", "routed-arrays"]),
        (SOFTMAX[:40], ["eplb", "no recording"]),
        (SOFTMAX, ["no recording"]),
        (RNG.random((4, 32)), ["eplb", "no recording"]),
    ],
)
def test_several_meanings_are_refused_by_name(array, choices):
    unread = choices == ["no recording"]
    advice = "record the experts instead" if unread else "say which with `format`"
    with pytest.raises(InvalidTraceError, match=advice) as error:
        judge(array, array.shape)
    assert all(choice in str(error.value) for choice in choices)


@pytest.mark.parametrize(
    ("array", "message"),
    [
        (np.zeros(3), "wanted a request's experts"),
        (np.zeros((2, 3, 4, 5)), "wanted a request's experts"),
        (np.zeros((2, 0)), r"\[2, 0\]"),
        (np.full((2, 3), np.nan), "must be finite"),
        (np.full((2, 3), -1), "must be >= 0"),
        (np.zeros((2, 3), bool), "wanted numbers"),
    ],
)
def test_what_is_nothing_says_why(array, message):
    with pytest.raises(InvalidTraceError, match=message):
        judge(array, array.shape)


def test_more_layers_than_models_have_are_tokens():
    check_layers(256)
    with pytest.raises(InvalidTraceError, match="implausible loads: 257 layers"):
        check_layers(257)


def test_a_named_table_is_looked_at_too():
    plausible_loads(even_loads(1, 6, 32)[0], "'a'")
    with pytest.raises(InvalidTraceError, match=r"'a': .*routed-arrays"):
        plausible_loads(ids(50, 8), "'a'")
    with pytest.raises(InvalidTraceError, match=r"'a': .*import-placement"):
        plausible_loads(ids(4, 32, experts=32), "'a'")
