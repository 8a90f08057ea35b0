"""Seconds of moves, against links counted by hand."""

from dataclasses import replace

import numpy as np
import pytest
from moetuner.evaluation.hardware import HARDWARE, LinkOf
from moetuner.evaluation.moving import fetch_seconds
from moetuner.evaluation.rates import Bandwidth
from moetuner.placement.changes import changes
from moetuner.placement.model import Placement
from moetuner.placement.topology import Topology

MACHINE = replace(
    HARDWARE["h100"], rank_bandwidth=100.0, nic_bandwidth=10.0, nic_of=LinkOf.RANK
)
BYTES = 50.0


def placed(*rows, ranks=4, per_node=2, experts=4):
    return Placement(
        slot_experts=np.array(rows, np.int32),
        layer_ids=np.arange(len(rows), dtype=np.int32),
        num_experts=experts,
        topology=Topology(num_ranks=ranks, ranks_per_node=per_node),
    )


def seconds(before, after, machine=MACHINE):
    return fetch_seconds(changes(before, after, BYTES), before, machine)


def test_nothing_takes_no_time():
    blocks = placed([0, 1, 2, 3])
    assert seconds(blocks, blocks) == 0


def test_neighbours_cross_the_fast_link_and_all_at_once():
    blocks = placed([0, 1, 2, 3], [0, 1, 2, 3])
    assert seconds(blocks, placed([1, 0, 2, 3], [0, 1, 2, 3])) == 50 / 100
    # Both layers and both nodes: each rank sends two and receives two.
    assert seconds(blocks, placed([1, 0, 3, 2], [1, 0, 3, 2])) == 2 * 50 / 100


def test_between_nodes_the_nic_of_each_rank_decides():
    blocks = placed([0, 1, 2, 3])
    assert seconds(blocks, placed([2, 1, 0, 3])) == 50 / 10
    # All four cross, each over the NICs of its own two ranks.
    assert seconds(blocks, placed([2, 3, 0, 1])) == 50 / 10


@pytest.mark.parametrize(
    ("after", "wanted"),
    [
        # Rank 1 fetches expert 0 from its neighbour, not from rank 2 or 3.
        ([0, 1, 1, 0, 0, 2, 0, 3], 50 / 100),
        # Ranks 0 and 1 both fetch 2, which ranks 2 and 3 have: one each.
        ([0, 2, 1, 2, 0, 2, 0, 3], 50 / 10),
    ],
)
def test_the_nearest_and_least_busy_holder_gives(after, wanted):
    two_holders = placed([0, 1, 1, -1, 0, 2, 2, 3])
    assert seconds(two_holders, placed(after)) == wanted


def test_a_nodes_own_link_carries_what_all_its_ranks_send():
    """20 bytes/s a node: as two cards of 10, but one rank alone may use it all."""
    of_node = replace(MACHINE, nic_bandwidth=20.0, nic_of=LinkOf.NODE)
    blocks = placed([0, 1, 2, 3])
    assert seconds(blocks, placed([2, 1, 0, 3]), of_node) == 50 / 20
    assert seconds(blocks, placed([2, 3, 0, 1]), of_node) == 2 * 50 / 20


def test_links_of_different_speed_are_told_apart():
    """Rank 1 receives slowly, so what it fetches takes longest."""
    uneven = Bandwidth(egress=(100.0,), ingress=(100.0, 5.0))
    slow = replace(MACHINE, rank_bandwidth=uneven)
    blocks = placed([0, 1, 2, 3])
    assert seconds(blocks, placed([1, 0, 2, 3]), slow) == 50 / 5


def test_a_slow_pair_of_ranks_is_waited_for():
    pairs = np.full((4, 4), 1e3) * ~np.eye(4, dtype=bool)
    pairs[0, 1] = 2.0
    machine = replace(MACHINE, ranks_per_node=2, pair_bandwidth=pairs.tolist())
    blocks = placed([0, 1, 2, 3])
    assert seconds(blocks, placed([1, 0, 2, 3]), machine) == 50 / 2
    assert seconds(blocks, placed([0, 1, 3, 2]), machine) == 50 / 100
    assert seconds(blocks, blocks, machine) == 0
