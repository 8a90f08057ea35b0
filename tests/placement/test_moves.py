"""Moves from one placement to another."""

from dataclasses import replace
from itertools import chain

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from moetuner.errors import InvalidPlacementError
from moetuner.placement.model import Placement
from moetuner.placement.moves import fetched_copies, moves_between
from moetuner.placement.topology import Topology

FOUR = Topology(num_ranks=4, ranks_per_node=2)


def placement_of(rank_of, slots=None, topology=FOUR):
    rank_of = np.asarray(rank_of, np.int32)
    return Placement.from_rank_of(
        rank_of,
        layer_ids=np.arange(3, 3 + len(rank_of), dtype=np.int32),
        topology=topology,
        slots_per_rank=slots,
    )


def follow(steps, old, slots):
    """Copies by layer and rank after the steps, each of which must be legal."""
    ranks = old.topology.num_ranks
    rows = old.slot_experts.reshape(len(old.layer_ids), ranks, -1)
    held = {
        layer: [set(row[row >= 0].tolist()) for row in rows[number]]
        for number, layer in enumerate(old.layer_ids.tolist())
    }
    for step in steps:
        layer = held[step.layer]
        here, there = layer[step.source], layer[step.target]
        assert step.source != step.target
        assert step.expert in here
        assert step.expert not in there
        assert step.exchanged is None or step.replaced is None
        if not step.kept:
            here.remove(step.expert)
        if step.exchanged is not None:
            there.remove(step.exchanged)
            assert step.exchanged not in here
            here.add(step.exchanged)
        if step.replaced is not None:
            assert len(there) == slots  # nothing is overwritten beside a free slot
            there.remove(step.replaced)
            assert any(step.replaced in on for on in layer)
        there.add(step.expert)
        assert max(map(len, layer)) <= slots
        assert set().union(*layer) == set(range(old.num_experts))
    return held


def copies(placement):
    ranks = placement.topology.num_ranks
    rows = placement.slot_experts.reshape(len(placement.layer_ids), ranks, -1)
    return [[set(row[row >= 0].tolist()) for row in layer] for layer in rows]


@given(st.integers(0, 2**32 - 1), st.integers(4, 12), st.integers(0, 1))
def test_the_steps_lead_there_within_the_slots(seed, num_experts, spare):
    rng = np.random.default_rng(seed)
    slots = -(-num_experts // 4) + spare
    places = np.repeat(np.arange(4), slots)
    old, new = (
        np.stack([rng.permutation(places)[:num_experts] for _ in range(2)])
        for _ in range(2)
    )
    before, after = placement_of(old, slots), placement_of(new, slots)
    steps = moves_between(before, after)
    held = follow(steps, before, slots)
    assert list(held.values()) == copies(after)
    assert not any(step.kept or step.replaced is not None for step in steps)
    moved = sum(1 + (step.exchanged is not None) for step in steps)
    assert len(steps) <= (old != new).sum() <= moved


def replicated(rng, num_experts, slots):
    """A random placement in which spare slots hold replicas, or nothing."""
    rows = []
    for _ in range(2):
        ranks = [[] for _ in range(4)]
        for expert in rng.permutation(num_experts).tolist():
            ranks[min(range(4), key=lambda r: (len(ranks[r]), rng.random()))].append(
                expert
            )
        for rank in ranks:
            others = rng.permutation(sorted(set(range(num_experts)) - set(rank)))
            rank += others[: rng.integers(0, slots - len(rank) + 1)].tolist()
            rank += [-1] * (slots - len(rank))
        rows.append([*chain(*ranks)])
    return replace(
        placement_of(np.arange(num_experts)[None] % 4),
        slot_experts=np.array(rows, np.int32),
        layer_ids=np.array([3, 7], np.int32),
    )


@given(
    st.integers(0, 2**32 - 1),
    st.integers(4, 12),
    st.integers(0, 3),
    st.integers(0, 3),
)
def test_replicas_never_exceed_the_slots_and_none_is_lost(seed, num_experts, one, two):
    """At the end every wanted copy is there; what else is there is in nobody's way."""
    rng = np.random.default_rng(seed)
    enough = -(-num_experts // 4)
    old = replicated(rng, num_experts, min(enough + one, num_experts))
    new = replicated(rng, num_experts, min(enough + two, num_experts))
    slots = max(old.slots_per_rank, new.slots_per_rank)
    steps = moves_between(old, new)
    held = follow(steps, old, slots)
    for now, wanted in zip(held.values(), copies(new), strict=True):
        assert all(want <= has for has, want in zip(now, wanted, strict=True))
    fetched = fetched_copies(old, new).size
    moved = sum(1 + (step.exchanged is not None) for step in steps)
    assert len(steps) <= fetched <= moved
    assert moves_between(new, new) == ()


def test_a_copy_with_another_one_gives_way_before_any_exchange():
    old = slots_of([[0, 1], [2, 0], [3, 2], [1, 3]])
    new = slots_of([[0, 2], [1, 3], [3, 2], [1, 0]])
    steps = moves_between(old, new)
    assert all(step.exchanged is None for step in steps)
    assert follow(steps, old, 2)[3][1] == {1, 3}


def slots_of(ranks):
    return replace(
        placement_of([[0, 1, 2, 3]]),
        slot_experts=np.array([[*chain(*ranks)]], np.int32),
    )


def test_two_that_change_places_take_one_step():
    steps = moves_between(placement_of([[0, 1, 2, 3]]), placement_of([[1, 0, 2, 3]]))
    assert [(step.expert, step.exchanged) for step in steps] == [(0, 1)]


def test_nothing_moves_between_equals_and_other_models_are_refused():
    here = placement_of([[0, 1, 2, 3]])
    assert moves_between(here, here) == ()
    with pytest.raises(InvalidPlacementError, match="of one model on the same ranks"):
        moves_between(here, placement_of([[0, 1, 2, 3, 3]]))
