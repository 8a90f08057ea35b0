"""Seconds of moves, against links counted by hand."""

from dataclasses import replace

import numpy as np
import pytest
from moetuner.evaluation.hardware import HARDWARE
from moetuner.evaluation.moving import fetch_seconds
from moetuner.placement.changes import changes
from moetuner.placement.model import Placement
from moetuner.placement.topology import Topology

MACHINE = replace(HARDWARE["h100"], rank_bandwidth=100.0, nic_bandwidth=10.0)
BYTES = 50.0


def placed(*rows, ranks=4, per_node=2, experts=4):
    return Placement(
        slot_experts=np.array(rows, np.int32),
        layer_ids=np.arange(len(rows), dtype=np.int32),
        num_experts=experts,
        topology=Topology(num_ranks=ranks, ranks_per_node=per_node),
    )


def seconds(before, after):
    return fetch_seconds(changes(before, after, BYTES), before, MACHINE)


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
