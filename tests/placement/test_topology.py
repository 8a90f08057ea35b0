import pytest
from hypothesis import given
from hypothesis import strategies as st
from moetuner.errors import InvalidProblemError
from moetuner.placement.topology import MAX_RANKS, Topology


def test_ranks_are_numbered_node_by_node():
    topology = Topology(num_ranks=6, ranks_per_node=2)
    assert topology.num_nodes == 3
    assert topology.nodes().tolist() == [0, 0, 1, 1, 2, 2]
    assert topology.same_node()[2].tolist() == [False, False, True, True, False, False]


@given(num_nodes=st.integers(1, 12), ranks_per_node=st.integers(1, 12))
def test_every_node_is_equally_full(num_nodes, ranks_per_node):
    topology = Topology(
        num_ranks=num_nodes * ranks_per_node, ranks_per_node=ranks_per_node
    )
    assert topology.num_nodes == num_nodes
    same = topology.same_node()
    assert (same.sum(axis=0) == ranks_per_node).all()
    assert (same == same.T).all()


def test_equal_topologies_are_equal_values():
    """They are compared, hashed and never changed."""
    one, two = (Topology(num_ranks=4, ranks_per_node=2) for _ in range(2))
    assert one == two
    assert hash(one) == hash(two)
    assert one != Topology(num_ranks=4, ranks_per_node=4)
    with pytest.raises(AttributeError):
        one.num_ranks = 8


@pytest.mark.parametrize("num_ranks", [0, -1, MAX_RANKS + 1, 10**30, float("nan")])
def test_impossible_rank_counts_are_refused(num_ranks):
    message = f"num_ranks must be 1..{MAX_RANKS}, got {num_ranks}"
    with pytest.raises(InvalidProblemError, match=message):
        Topology(num_ranks=num_ranks, ranks_per_node=1)


@pytest.mark.parametrize("ranks_per_node", [0, -2, 3, 5, 8])
def test_nodes_that_are_not_equally_full_are_refused(ranks_per_node):
    message = f"ranks_per_node must divide num_ranks=4, got {ranks_per_node}"
    with pytest.raises(InvalidProblemError, match=message):
        Topology(num_ranks=4, ranks_per_node=ranks_per_node)


def test_the_largest_group_is_legal():
    assert Topology(num_ranks=MAX_RANKS, ranks_per_node=8).num_nodes == MAX_RANKS // 8


@pytest.mark.parametrize("value", [8.0, "8", True, None])
def test_counts_that_are_not_whole_are_refused(value):
    for fields in ({"num_ranks": value}, {"ranks_per_node": value}):
        with pytest.raises(InvalidProblemError, match=f"whole number, got {value!r}"):
            Topology(**({"num_ranks": 8, "ranks_per_node": 1} | fields))
