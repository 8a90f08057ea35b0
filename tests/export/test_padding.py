import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from moetuner.errors import InvalidPlacementError
from moetuner.export import fill_slots
from moetuner.placement.model import EMPTY, Placement
from moetuner.placement.topology import Topology
from strategies import random_placement, topologies, traces


def test_a_spare_slot_takes_the_coldest_expert_that_its_rank_lacks(placement):
    """Both replicas' weights are read in decode, which is rare for a cold one."""
    filled = fill_slots(placement, load=np.array([[9, 1, 5, 5], [1, 2, 3, 4]]))
    assert filled.num_added == 2
    # rank 1 lacks 1 and 3 at the first layer, rank 0 lacks 1 and 3 at the second
    assert filled.slots.tolist() == [[1, 0, 3, 2, 1, 0], [2, 1, 0, 1, 3, 2]]
    plan = Placement(
        slot_experts=np.array([[0, 1, -1, -1, 2, 3, -1, -1]], np.int32),
        layer_ids=np.array([0], np.int32),
        num_experts=4,
        topology=Topology(num_ranks=2, ranks_per_node=2),
    )
    slots = fill_slots(plan, load=np.array([[9, 4, 2, 7]])).slots
    assert slots.tolist() == [[0, 1, 2, 3, 2, 3, 1, 0]]


def test_where_loads_are_unknown_no_token_goes_elsewhere(placement):
    """Expert 0 is on both ranks, half its tokens on each: so it stays."""
    plan = Placement(
        slot_experts=np.array([[0, 1, -1, 0, 2, -1]], np.int32),
        layer_ids=np.array([0], np.int32),
        num_experts=3,
        topology=Topology(num_ranks=2, ranks_per_node=2),
    )
    assert fill_slots(plan).slots.tolist() == [[0, 1, 1, 0, 2, 2]]
    # at the second layer expert 2 is on rank 1 too
    slots = fill_slots(placement).slots
    assert slots.tolist() == [[1, 0, 3, 2, 2, 0], [2, 0, 0, 1, 3, 2]]


def test_without_repeats_it_takes_an_expert_of_another_rank(placement):
    filled = fill_slots(placement, repeats=False)
    assert filled.slots.tolist() == [[1, 0, 3, 2, 1, 0], [2, 1, 0, 1, 3, 2]]
    load = np.array([[0, 9, 5, 4], [1, 20, 3, 4]])
    filled = fill_slots(placement, load=load, repeats=False)
    assert filled.slots.tolist() == [[1, 0, 3, 2, 3, 0], [2, 3, 0, 1, 3, 2]]


@given(traces(), topologies, st.integers(0, 2), st.booleans(), st.booleans(), st.data())
def test_filling_adds_replicas_only(trace, topology, extra, repeats, loaded, data):
    rng = np.random.default_rng(data.draw(st.integers(0, 99)))
    plan = random_placement(rng, trace, topology, extra)
    load = rng.integers(0, 9, (plan.num_layers, plan.num_experts)) if loaded else None
    if not repeats and plan.slots_per_rank > plan.num_experts:
        with pytest.raises(InvalidPlacementError, match="would hold one twice"):
            fill_slots(plan, load=load, repeats=False)
        return
    filled = fill_slots(plan, load=load, repeats=repeats)
    old = plan.slot_experts
    assert filled.num_added == (old == EMPTY).sum()
    assert np.array_equal(filled.slots[old != EMPTY], old[old != EMPTY])
    assert filled.slots.min() >= 0
    if not repeats or (loaded and plan.slots_per_rank <= plan.num_experts):
        # Then it is a legal placement as it is.
        Placement(
            slot_experts=filled.slots,
            layer_ids=plan.layer_ids,
            num_experts=plan.num_experts,
            topology=topology,
        )
        return
    for layer, row in enumerate(filled.slots):
        ranks = zip(
            row.reshape(topology.num_ranks, -1),
            old[layer].reshape(topology.num_ranks, -1),
            strict=True,
        )
        for now, before in ranks:
            held = set(before.tolist()) - {EMPTY}
            assert loaded or not held or set(now.tolist()) == held


def test_a_rank_without_any_expert_gets_replicas_of_others():
    plan = Placement(
        slot_experts=np.array([[0, 1, -1, -1]], np.int32),
        layer_ids=np.array([0], np.int32),
        num_experts=2,
        topology=Topology(num_ranks=2, ranks_per_node=2),
    )
    assert fill_slots(plan, load=np.array([[1, 5]])).slots.tolist() == [[0, 1, 0, 1]]


@pytest.mark.parametrize(
    ("load", "message"),
    [
        (np.zeros((2, 3)), r"must be numbers \[2, 4\]"),
        (np.zeros((2, 4), bool), "must be numbers"),
        (np.full((2, 4), np.nan), "finite"),
        (np.full((2, 4), -1), "finite and >= 0"),
    ],
)
def test_load_is_checked(placement, load, message):
    with pytest.raises(InvalidPlacementError, match=message):
        fill_slots(placement, load=load)
