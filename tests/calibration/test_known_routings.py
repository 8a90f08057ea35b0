"""Known routings put on links and ranks what their names say."""

import numpy as np
import pytest
from made_machine import ONE_NODE, TWO_NODES
from moetuner.calibration.loads import known_load, loads_of, spread_evenly, uneven
from moetuner.calibration.samples import Case, Form, LayerShape, Load
from moetuner.placement.topology import Topology

SHAPE = LayerShape(hidden_size=8, inner_size=8, num_experts=16, top_k=3)
TOKENS = 10


def counts(load, topology, shape=SHAPE):
    case = Case(
        shape=shape,
        form=Form.EXACT,
        load=load,
        num_tokens=TOKENS,
        num_ranks=topology.num_ranks,
    )
    return known_load(case, topology, 0)


@pytest.mark.parametrize(
    ("num_rows", "active"), [(1, 1), (16, 16), (1024, 16), (3200, 32), (999, 7)]
)
def test_rows_of_experts_go_from_one_to_twice_the_mean(num_rows, active):
    each = uneven(num_rows, active)
    assert (len(each), each.sum(), each.min() >= 1) == (active, num_rows, True)
    mean = num_rows / active
    assert each.max() <= 2 * mean
    if mean > 50 and active > 1:
        assert each.min() < 0.2 * mean
        assert each.max() > 1.8 * mean


def rows(known):
    """Rows from rank to rank, [G, G], and those that each rank computes, [G]."""
    found = known.counts
    return found.traffic[0], found.rank_rows()[0, 0]


def test_local_tokens_stay():
    traffic, computed = rows(counts(Load.LOCAL, ONE_NODE))
    assert np.array_equal(traffic, TOKENS * np.eye(4))
    assert (computed == TOKENS * 3).all()


def test_next_tokens_all_go_one_rank_on():
    traffic, _ = rows(counts(Load.NEXT, ONE_NODE))
    assert np.array_equal(traffic, TOKENS * np.roll(np.eye(4), 1, axis=1))
    traffic, _ = rows(counts(Load.NEXT, TWO_NODES))
    pairs = np.kron(np.eye(2), [[0, 1], [1, 0]])
    assert np.array_equal(traffic, TOKENS * pairs)


def test_tokens_to_the_next_node_keep_their_place():
    traffic, _ = rows(counts(Load.NEXT_NODE, TWO_NODES))
    assert np.array_equal(traffic, TOKENS * np.roll(np.eye(4), 2, axis=1))


def test_one_rank_takes_in_all():
    traffic, computed = rows(counts(Load.TO_ONE, ONE_NODE))
    assert (traffic[:, 0] == TOKENS).all()
    assert traffic[:, 1:].sum() == 0
    assert computed.tolist() == [TOKENS * 3 * 4, 0, 0, 0]


def test_one_rank_sends_to_as_many_as_a_token_has_experts():
    known = counts(Load.FROM_ONE, ONE_NODE)
    traffic, computed = rows(known)
    assert traffic[0].sum() == TOKENS * 3
    assert traffic[1:].sum() == 0
    assert computed.sum() == TOKENS * 3
    assert len(known.ids(0)) == TOKENS
    assert len(known.ids(1)) == 0


def test_uniform_tokens_go_everywhere_and_are_the_same_each_time():
    traffic, computed = rows(counts(Load.UNIFORM, ONE_NODE))
    assert (traffic > 0).all()
    assert computed.sum() == TOKENS * 3 * 4
    again, _ = rows(counts(Load.UNIFORM, ONE_NODE))
    assert np.array_equal(traffic, again)


def test_a_rank_with_fewer_experts_than_a_token_wants_gets_padding():
    few = LayerShape(hidden_size=8, inner_size=8, num_experts=4, top_k=3)
    known = counts(Load.LOCAL, ONE_NODE, few)
    assert (known.ids(2) == [2, -1, -1]).all()


def test_experts_that_ranks_cannot_share_leave_empty_slots():
    odd = LayerShape(hidden_size=8, inner_size=8, num_experts=6, top_k=2)
    placement = spread_evenly(odd, ONE_NODE)
    assert placement.slots_per_rank == 2
    assert (placement.slot_experts == -1).sum() == 2
    traffic, _ = rows(counts(Load.TO_ONE, ONE_NODE, odd))
    assert traffic[:, 1:].sum() == 0


@pytest.mark.parametrize(
    ("topology", "loads"),
    [
        (Topology(num_ranks=1, ranks_per_node=1), "local"),
        (Topology(num_ranks=2, ranks_per_node=2), "local, next rank, uniform"),
        (Topology(num_ranks=2, ranks_per_node=1), "local, next node, uniform"),
        (ONE_NODE, "local, next rank, to one rank, from one rank, uniform"),
        (
            TWO_NODES,
            "local, next rank, next node, to one rank, from one rank, uniform",
        ),
    ],
)
def test_loads_are_those_that_differ(topology, loads):
    assert ", ".join(load.value for load in loads_of(topology)) == loads
    for load in loads_of(topology):
        assert counts(load, topology).counts.tokens[0] > 0
