"""What moves between two placements, against sets of (layer, expert, rank)."""

import numpy as np
from hypothesis import given
from hypothesis import strategies as st
from moetuner.placement.changes import changes
from moetuner.placement.model import EMPTY
from strategies import random_placement, topologies, traces


def copies(placement):
    return {
        (layer, int(expert), slot // placement.slots_per_rank)
        for layer, row in enumerate(placement.slot_experts)
        for slot, expert in enumerate(row)
        if expert != EMPTY
    }


@given(
    trace=traces(),
    topology=topologies,
    extra=st.tuples(st.integers(0, 2), st.integers(0, 2)),
    seed=st.integers(0, 99),
)
def test_copies_to_fetch_are_those_that_a_rank_did_not_have(
    trace, topology, extra, seed
):
    rng = np.random.default_rng(seed)
    before = random_placement(rng, trace, topology, extra[0])
    after = random_placement(rng, trace, topology, extra[1])
    moved = changes(before, after, expert_bytes=10.0)
    wanted = copies(after) - copies(before)
    listed = list(zip(moved.layer, moved.expert, moved.rank, strict=True))
    assert set(listed) == wanted
    assert len(listed) == len(wanted) == moved.num_moved
    assert moved.num_replicas == len(copies(after))
    assert moved.bytes_moved == 10.0 * len(wanted)
    per_node = topology.ranks_per_node
    on_node = {(layer, e, rank // per_node) for layer, e, rank in copies(before)}
    for (layer, expert, rank), far in zip(listed, moved.between_nodes, strict=True):
        assert far == ((layer, expert, rank // per_node) not in on_node)
    assert moved.per_rank().sum() == len(wanted)
    near, far = (moved.per_rank(between_nodes=kind) for kind in (False, True))
    np.testing.assert_array_equal(near + far, moved.per_rank())


@given(trace=traces(), topology=topologies)
def test_nothing_moves_to_the_same_placement(trace, topology):
    placement = random_placement(np.random.default_rng(1), trace, topology, 1)
    assert changes(placement, placement, 1.0).num_moved == 0
