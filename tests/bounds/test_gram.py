"""The parts of the bounds, each against every partition that there is."""

import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from moetuner.bounds.balance import fullest_group, min_remote
from moetuner.bounds.gram import Groups, KeptWeight
from moetuner.bounds.touches import Touches, turan_pairs, visit_lines, ways
from moetuner.bounds.visits import RuleBook, Visits
from strategies import examples

GROUPS = [
    Groups(num_groups=2, sizes=(3,)),
    Groups(num_groups=3, sizes=(2,)),
    Groups(num_groups=2, sizes=(2, 2)),
    Groups(num_groups=2, sizes=(2, 1), apart=True),
    Groups(num_groups=3, sizes=(1, 1), apart=True),
    Groups(num_groups=4, sizes=(1,)),
    Groups(num_groups=1, sizes=(3,)),
]


def all_partitions(groups):
    """Group of each item, every way to fill the groups block by block."""
    parts = []
    for size in groups.sizes:
        labels = np.repeat(np.arange(groups.num_groups), size)
        parts.append(sorted(set(itertools.permutations(labels.tolist()))))
    return [np.concatenate(choice) for choice in itertools.product(*parts)]


def same(labels):
    return (labels[:, None] == labels).astype(float)


@pytest.mark.parametrize("groups", GROUPS, ids=str)
@given(seed=st.integers(0, 2**32 - 1), steps=st.integers(0, 120))
@examples(15)
def test_no_partition_keeps_more_than_the_bound(groups, seed, steps):
    """At any iterate, for weights of either sign."""
    rng = np.random.default_rng(seed)
    weight = rng.normal(size=(groups.num_items, groups.num_items))
    weight = weight + weight.T
    kept = max((weight * same(labels)).sum() for labels in all_partitions(groups))
    search = KeptWeight(weight=weight, groups=groups)
    assert search.quick() >= kept - 1e-9
    assert search.improve(max_iterations=steps) >= kept - 1e-9


def test_two_clear_clusters_are_bounded_exactly():
    labels = np.array([0, 1, 0, 1, 0, 1])
    weight = same(labels) - np.eye(6)
    search = KeptWeight(weight=weight, groups=GROUPS[0])
    assert search.improve() == pytest.approx(12, rel=1e-6)


def test_single_precision_iterates_lose_no_safety(rng):
    """Planted clusters of many items: what they keep stays below the bound, closely."""
    labels = rng.permutation(np.repeat(np.arange(8), 16))
    noise = rng.random((128, 128))
    weight = 2 * same(labels) + (noise + noise.T) / 2
    planted = (weight * same(labels)).sum()
    bound = KeptWeight(weight=weight, groups=Groups(num_groups=8, sizes=(16,))).improve(
        max_iterations=200
    )
    assert planted * (1 - 1e-12) <= bound <= planted * 1.05


@pytest.mark.parametrize("num_groups", [1, 2, 3, 5])
@pytest.mark.parametrize("capacity", [1, 2, 4])
@pytest.mark.parametrize("size", range(1, 8))
def test_lines_lie_below_every_way_to_visit(size, num_groups, capacity):
    if size > num_groups * capacity:
        return
    lines = visit_lines(size, num_groups, capacity)
    tight = 0
    # Names of groups and items do not matter, sizes do.
    for labels in itertools.combinations_with_replacement(range(num_groups), size):
        sizes = np.bincount(labels)
        if sizes.max() > capacity:
            continue
        cut = (size * size - (sizes**2).sum()) / 2
        visited = (sizes > 0).sum()
        values = lines[:, 0] + lines[:, 1] * cut
        assert (values <= visited + 1e-9).all()
        tight += values.max() > visited - 1e-9
    assert tight  # somewhere they touch


@pytest.mark.parametrize("size", range(1, 9))
@pytest.mark.parametrize("groups", range(1, 6))
def test_turan_counts_the_pairs_of_even_groups(size, groups):
    labels = np.arange(size) % groups
    cut = sum(a != b for a, b in itertools.combinations(labels.tolist(), 2))
    assert turan_pairs(size, groups) == cut


@pytest.mark.parametrize("shape", [(4, 2, 3), (5, 3, 2), (6, 6, 6), (7, 4, 7)])
@given(seed=st.integers(0, 2**32 - 1))
@examples(5)
def test_learnt_rules_hold_for_every_way_and_lines_are_not_lost(shape, seed):
    size, num_groups, capacity = shape
    touches = Touches(size=size, num_groups=num_groups, capacity=capacity)
    lines = len(touches.rules)
    visited, kept = ways(*shape)
    rng = np.random.default_rng(seed)
    # Chances of being together that some mixture of ways has.
    chances = rng.dirichlet(np.ones(5), 30) @ kept[rng.integers(0, len(kept), 5)]
    touches.learn(chances)
    values = touches.rules[:, 0] + kept @ touches.rules[:, 1:].T
    assert (values <= visited[:, None] + 1e-9).all()
    by_lines = (touches.rules[:lines, 0] + chances @ touches.rules[:lines, 1:].T).max(1)
    best = touches.best(chances)
    assert (best[:, 0] + (best[:, 1:] * chances).sum(1) >= by_lines - 1e-9).all()


def test_a_rule_is_learnt_where_lines_miss():
    """Three items of four always together: two groups, of which lines see 1.75."""
    touches = Touches(size=4, num_groups=4, capacity=4)
    together = np.array([[1, 1, 0, 1, 0, 0.0]])  # pairs 01 02 03 12 13 23
    assert (touches.rules[:, 0] + together @ touches.rules[:, 1:].T).max() == 1.75
    touches.learn(together)
    best = touches.best(together)
    assert (best[:, 0] + (best[:, 1:] * together).sum(1)).max() == pytest.approx(2)


def test_ways_are_all_ways_once():
    """Bell numbers, and what is left of them where groups are few or small."""
    assert [len(ways(size, size, size)[0]) for size in range(1, 7)] == [
        *(1, 2, 5, 15, 52, 203)
    ]
    assert len(ways(4, 2, 4)[0]) == 8
    assert len(ways(4, 4, 2)[0]) == 10
    assert ways(12, 12, 12) is None
    visited, kept = ways(3, 3, 3)
    assert sorted(zip(visited, kept.sum(1), strict=True)) == [
        *((1, 3), (2, 1), (2, 1), (2, 1), (3, 0))
    ]


@given(st.integers(0, 2**32 - 1), st.integers(0, 1), st.booleans())
def test_visits_are_bounded_whatever_rules_are_taken(seed, free, learn):
    rng = np.random.default_rng(seed)
    groups = Groups(num_groups=3, sizes=(2,))
    items = np.stack([rng.permutation(6)[:4] for _ in range(5)])
    items[:, 1:][rng.random((5, 3)) < 0.3] = -1
    visits = Visits(items=items, weight=0.5, free=free)
    guess = rng.random((6, 6))
    guess = (guess + guess.T) / 2
    constant, kept = visits.kept(3, 2, guess, RuleBook(), learn=learn)
    for labels in all_partitions(groups):
        truth = 0.0
        for row in items:
            held = {int(labels[i]) for i in row[row >= 0]}
            truth += 0.5 * (len(held) - free)
        assert constant - (kept * same(labels)).sum() <= truth + 1e-9


@given(st.integers(0, 2**32 - 1), st.sampled_from([(2, 3), (3, 2), (2, 2), (5, 1)]))
def test_the_fullest_group_holds_at_least_that(seed, shape):
    rng = np.random.default_rng(seed)
    num_groups, slots = shape
    num_experts = int(rng.integers(num_groups, num_groups * slots + 1))
    rows = rng.integers(0, 20, num_experts).astype(float)
    least = np.inf
    for labels in itertools.product(range(num_groups), repeat=num_experts):
        if np.bincount(labels).max() <= slots:
            sums = np.bincount(labels, weights=rows, minlength=num_groups)
            least = min(least, sums.max())
    assert fullest_group(rows, num_groups, slots, 0) <= least + 1e-9
    assert fullest_group(rows, num_groups, slots, 1) <= least + 1e-9


def test_replicas_go_to_the_heaviest_in_what_must_leave():
    """Two groups, rows 8, 4, 2: one replica brings the 8 home, halves of 4 and 2 go."""
    rows = np.array([2.0, 8.0, 4.0])
    assert min_remote(rows, 2, 0) == 7.0
    assert min_remote(rows, 2, 1) == 3.0
    assert min_remote(rows, 2, 3) == 0.0
