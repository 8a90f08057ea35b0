"""Moves from one placement to another."""

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from moetuner.errors import InvalidPlacementError
from moetuner.movement import moves_between
from moetuner.placement import Placement
from moetuner.topology import Topology

FOUR = Topology(num_ranks=4, ranks_per_node=2)


def placement_of(rank_of, slots=None, topology=FOUR):
    rank_of = np.asarray(rank_of, np.int32)
    return Placement.from_rank_of(
        rank_of,
        layer_ids=np.arange(3, 3 + len(rank_of), dtype=np.int32),
        topology=topology,
        slots_per_rank=slots,
    )


@given(st.integers(0, 2**32 - 1), st.integers(4, 12), st.integers(0, 1))
def test_the_steps_lead_there_within_the_slots(seed, num_experts, spare):
    rng = np.random.default_rng(seed)
    slots = -(-num_experts // 4) + spare
    places = np.repeat(np.arange(4), slots)
    old, new = (
        np.stack([rng.permutation(places)[:num_experts] for _ in range(2)])
        for _ in range(2)
    )
    steps = moves_between(placement_of(old, slots), placement_of(new, slots))
    rank = old.copy()
    for step in steps:
        row = rank[step.layer - 3]
        assert row[step.expert] == step.source != step.target
        row[step.expert] = step.target
        if step.exchanged is not None:
            assert row[step.exchanged] == step.target
            row[step.exchanged] = step.source
        assert np.bincount(row, minlength=4).max() <= slots
    np.testing.assert_array_equal(rank, new)
    moved = sum(1 + (step.exchanged is not None) for step in steps)
    assert len(steps) <= (old != new).sum() <= moved


def test_two_that_change_places_take_one_step():
    steps = moves_between(placement_of([[0, 1, 2, 3]]), placement_of([[1, 0, 2, 3]]))
    assert [(step.expert, step.exchanged) for step in steps] == [(0, 1)]


def test_nothing_moves_between_equals_and_other_models_are_refused():
    here = placement_of([[0, 1, 2, 3]])
    assert moves_between(here, here) == ()
    with pytest.raises(InvalidPlacementError, match="of one model on the same ranks"):
        moves_between(here, placement_of([[0, 1, 2, 3, 3]]))
    slots = np.array([[0, 1, 1, 2, 2, 3, 3, 0]], np.int32)
    copies = replace(here, slot_experts=slots)
    with pytest.raises(InvalidPlacementError, match="without replicas"):
        moves_between(here, copies)
