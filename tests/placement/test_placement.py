import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from moetuner._words import amount
from moetuner.errors import InvalidPlacementError, InvalidProblemError
from moetuner.placement.model import EMPTY, Placement, Provenance, contiguous_rank_of
from moetuner.placement.topology import Topology
from strategies import random_placement, topologies, traces

TWO_RANKS = Topology(num_ranks=2, ranks_per_node=2)


def placement(slots, **changed):
    """Four experts on two ranks, layers 0.. unless told otherwise."""
    slots = np.array(slots, np.int32)
    fields = {
        "slot_experts": slots,
        "layer_ids": np.arange(len(slots), dtype=np.int32),
        "num_experts": 4,
        "topology": TWO_RANKS,
    }
    return Placement(**(fields | changed))


def test_slots_are_numbered_rank_by_rank():
    found = placement([[0, 2, 1, 3], [3, 1, 0, 2]])
    assert (found.num_layers, found.num_slots, found.slots_per_rank) == (2, 4, 2)
    assert found.rank_of().tolist() == [[0, 1, 0, 1], [1, 0, 1, 0]]
    assert not found.has_replicas
    assert found.provenance == Provenance()


def test_empty_slots_are_legal():
    found = placement([[0, EMPTY, EMPTY, 3, 2, 1]])
    assert found.rank_of().tolist() == [[0, 1, 1, 1]]
    assert not found.has_replicas


def test_a_replica_has_no_single_rank():
    found = placement([[0, 1, 2, 0, 3, EMPTY]])
    assert found.has_replicas
    with pytest.raises(InvalidPlacementError, match="replicas has no single rank"):
        found.rank_of()


def test_a_replica_in_any_layer_counts():
    assert placement([[0, 1, EMPTY, 2, 3, EMPTY], [0, 1, 2, 0, 3, EMPTY]]).has_replicas


def test_the_hash_is_of_what_sits_where_and_nothing_else():
    slots = [[0, 2, 1, 3], [3, 1, 0, 2]]
    known = placement(slots)
    again = placement(slots, provenance=Provenance(solver="lpt"))
    assert known.sha256() == again.sha256()
    one_node_each = Topology(num_ranks=2, ranks_per_node=1)
    others = [
        placement([[2, 0, 1, 3], [3, 1, 0, 2]]),
        placement(slots, layer_ids=np.array([0, 2], np.int32)),
        placement(slots, topology=one_node_each),
        placement([[0, 2, EMPTY, 1, 3, EMPTY], [3, 1, EMPTY, 0, 2, EMPTY]]),
    ]
    assert len({each.sha256() for each in [known, *others]}) == 5


def test_what_was_validated_cannot_change():
    """Neither through the placement nor through the caller's own array."""
    mine = np.array([[0, 1, 2, 3]], np.int32)
    found = placement(mine, slot_experts=mine)
    mine[0, 0] = 3
    assert found.slot_experts.tolist() == [[0, 1, 2, 3]]
    for array in (found.slot_experts, found.layer_ids):
        with pytest.raises(ValueError, match="read-only"):
            array[0] = 0


def test_any_memory_order_is_stored_in_c_order():
    """The core takes contiguous tables only."""
    slots = np.asfortranarray(np.array([[0, 1, 2, 3], [3, 2, 1, 0]], np.int32))
    found = placement(slots, slot_experts=slots)
    assert found.slot_experts.flags.c_contiguous
    assert found.slot_experts.tolist() == slots.tolist()


REFUSED = {
    "wrong type": (
        {"slot_experts": np.zeros((1, 4), np.int64)},
        r"slot_experts must be int32 \[layers, slots\], got int64 \[1, 4\]",
    ),
    "wrong shape": ({"slot_experts": np.arange(4, dtype=np.int32)}, r"got int32 \[4\]"),
    "no layers": ({"slot_experts": np.zeros((0, 4), np.int32)}, r"int32 \[0, 4\]"),
    "no slots": ({"slot_experts": np.zeros((1, 0), np.int32)}, r"int32 \[1, 0\]"),
    "unequal slots": (
        {"slot_experts": np.array([[0, 1, 2, 3, EMPTY]], np.int32)},
        "5 slots cannot be shared equally by 2 ranks",
    ),
    "layers of another length": (
        {"layer_ids": np.arange(2, dtype=np.int32)},
        r"layer_ids must be int32 \[1\], got int32 \[2\]",
    ),
    "layers of another type": (
        {"layer_ids": np.arange(1)},
        r"layer_ids must be int32 \[1\], got int64 \[1\]",
    ),
    "a negative layer": (
        {"layer_ids": np.array([-1], np.int32)},
        r"layer_ids must not be negative, got \[-1\]",
    ),
    "no experts": (
        {"num_experts": 0, "slot_experts": np.full((1, 4), EMPTY, np.int32)},
        "num_experts must be positive, got 0",
    ),
    "experts that are not whole": (
        {"num_experts": 4.0},
        "num_experts must be positive, got 4.0",
    ),
    "a list": (
        {"slot_experts": [[0, 1, 2, 3]]},
        r"slot_experts must be int32 \[layers, slots\], got a list",
    ),
    "an expert too many": (
        {"num_experts": 3},
        r"layer 0 holds expert 3, outside 0\.\.2 \(-1 is an empty slot\)",
    ),
    "a negative expert": (
        {"slot_experts": np.array([[0, 1, 2, 3, -2, -1]], np.int32)},
        "layer 0 holds expert -2",
    ),
    "a missing expert": (
        {"num_experts": 6},
        r"layer 0 has no slot for experts \[4, 5\]",
    ),
    "an expert twice on one rank": (
        {"slot_experts": np.array([[0, 1, -1, 2, 3, 2]], np.int32)},
        "rank 1 holds expert 2 twice at layer 0",
    ),
}


@pytest.mark.parametrize(("changed", "message"), REFUSED.values(), ids=REFUSED)
def test_what_is_not_legal_is_refused_with_the_reason(changed, message):
    with pytest.raises(InvalidPlacementError, match=message):
        placement([[0, 1, 2, 3]], **changed)


@pytest.mark.parametrize("layers", [[3, 3], [5, 3]])
def test_layers_must_increase(layers):
    with pytest.raises(InvalidPlacementError, match="must be strictly increasing"):
        placement([[0, 1, 2, 3]] * 2, layer_ids=np.array(layers, np.int32))


def test_the_model_s_own_layer_number_is_named():
    """The broken layer is the second row, which the model calls layer 7."""
    with pytest.raises(InvalidPlacementError, match=r"layer 7 has no slot for.*\[3\]"):
        placement(
            [[0, 1, 2, 3], [0, 1, 2, EMPTY]], layer_ids=np.array([3, 7], np.int32)
        )


def test_experts_fill_a_rank_in_order_of_their_ids():
    rank_of = np.array([[1, 0, 1, 0], [0, 1, 1, 1]])
    layers = np.arange(2, dtype=np.int32)
    found = Placement.from_rank_of(rank_of, layer_ids=layers, topology=TWO_RANKS)
    assert found.slot_experts.tolist() == [
        [1, 3, EMPTY, 0, 2, EMPTY],
        [0, EMPTY, EMPTY, 1, 2, 3],
    ]
    wider = Placement.from_rank_of(
        rank_of, layer_ids=layers, topology=TWO_RANKS, slots_per_rank=4
    )
    assert wider.slots_per_rank == 4
    assert wider.rank_of().tolist() == rank_of.tolist()


@given(
    topology=topologies,
    num_layers=st.integers(1, 4),
    num_experts=st.integers(1, 9),
    spare=st.integers(0, 2),
    seed=st.integers(0, 2**32 - 1),
)
def test_ranks_survive_the_slot_map(topology, num_layers, num_experts, spare, seed):
    rng = np.random.default_rng(seed)
    rank_of = rng.integers(0, topology.num_ranks, (num_layers, num_experts))
    largest = max(np.bincount(row).max() for row in rank_of)
    found = Placement.from_rank_of(
        rank_of,
        layer_ids=np.arange(num_layers, dtype=np.int32),
        topology=topology,
        slots_per_rank=int(largest) + spare,
    )
    np.testing.assert_array_equal(found.rank_of(), rank_of)
    assert found.slots_per_rank == largest + spare


@given(trace=traces(), topology=topologies, seed=st.integers(0, 2**32 - 1))
def test_replicas_are_found(trace, topology, seed):
    found = random_placement(np.random.default_rng(seed), trace, topology, 1)
    slots_of = [np.bincount(row[row >= 0]) for row in found.slot_experts]
    assert found.has_replicas == any(count.max() > 1 for count in slots_of)


@pytest.mark.parametrize(
    ("rank_of", "fields", "message"),
    [
        ([0, 1], {}, r"rank_of must be \[layers, experts\], got \[2\]"),
        ([[]], {}, r"rank_of must be \[layers, experts\], got \[1, 0\]"),
        ([[0, 2]], {}, r"ranks must be 0\.\.1, got 0\.\.2"),
        ([[0, -1]], {}, r"ranks must be 0\.\.1, got -1\.\.0"),
        ([[0], [1]], {}, r"layer_ids must be \[2\], one per row of rank_of, got \[1\]"),
        (
            [[1, 1, 1, 0]],
            {"slots_per_rank": 2},
            "a rank holds 3 experts at layer 5, but has 2 slots",
        ),
    ],
)
def test_ranks_that_make_no_placement_are_refused(rank_of, fields, message):
    with pytest.raises(InvalidPlacementError, match=f"from_rank_of: .*{message}"):
        Placement.from_rank_of(
            np.array(rank_of, int),
            layer_ids=np.array([5], np.int32),
            topology=TWO_RANKS,
            **fields,
        )


def test_ranks_that_are_not_whole_are_refused():
    with pytest.raises(InvalidPlacementError, match="must be integers, got float64"):
        Placement.from_rank_of(
            np.array([[0.0, 1.0]]),
            layer_ids=np.array([5], np.int32),
            topology=TWO_RANKS,
        )


def test_contiguous_blocks():
    assert contiguous_rank_of(2, 6, 3).tolist() == [[0, 0, 1, 1, 2, 2]] * 2
    assert contiguous_rank_of(1, 7, 3).tolist() == [[0, 0, 0, 1, 1, 2, 2]]


@given(num_experts=st.integers(1, 40), num_ranks=st.integers(1, 40))
def test_contiguous_blocks_differ_by_one_expert_at_most(num_experts, num_ranks):
    if num_experts < num_ranks:
        message = f"{amount(num_experts, 'expert')} cannot cover {num_ranks} ranks"
        with pytest.raises(InvalidProblemError, match=message):
            contiguous_rank_of(1, num_experts, num_ranks)
        return
    row = contiguous_rank_of(1, num_experts, num_ranks)[0]
    sizes = np.bincount(row, minlength=num_ranks)
    assert (np.diff(row) >= 0).all()
    assert sizes.max() - sizes.min() <= 1
    assert (np.diff(sizes) <= 0).all()
