import os
import signal
import threading

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from moetuner import _core
from moetuner.errors import (
    InvalidPlacementError,
    InvalidTraceError,
    MissingStatisticsError,
)
from moetuner.evaluation import reference
from moetuner.evaluation.cost import Homes, Wire
from moetuner.evaluation.replica_rule import ReplicaRule, rank_slots
from moetuner.evaluation.tally import tally
from moetuner.placement.model import Placement
from moetuner.placement.topology import Topology
from moetuner.trace import CountTrace
from strategies import (
    make_trace,
    random_ids,
    random_placement,
    topologies,
    traces,
)


def core_tally(trace, placement, wire, homes, rule, groups, threads=2):
    static = rule is ReplicaRule.SGLANG_STATIC
    return _core.tally_routing(
        trace.topk_ids,
        placement.slot_experts,
        trace.num_experts,
        placement.topology.num_ranks,
        placement.topology.ranks_per_node,
        wire.rules,
        homes,
        rule,
        rank_slots(placement) if static else None,
        trace.home_rank,
        groups,
        int(max(groups, default=0)) + 1,
        threads,
    )


@pytest.mark.parametrize("work", ["tally", "statistics"])
def test_signals_are_heard_while_the_core_counts(rng, work):
    """Not only when it is done: several handlers run within one call."""
    trace = make_trace(random_ids(rng, 4000, 48, 32, 4), 32)
    placement = random_placement(rng, trace, Topology(num_ranks=8, ranks_per_node=8))
    groups = np.zeros(trace.num_tokens, np.int32)
    heard, done = [], threading.Event()
    calls = 0  # a signal may come before the first call

    def send():
        while not done.wait(0.0005):
            os.kill(os.getpid(), signal.SIGUSR1)

    before = signal.signal(signal.SIGUSR1, lambda *_: heard.append(calls))
    sender = threading.Thread(target=send)
    sender.start()
    try:
        for calls in range(200):  # one is enough, but on a busy machine
            if work == "tally":
                core_tally(
                    *(trace, placement, Wire.DEDUP, Homes.UNIFORM),
                    *(ReplicaRule.MOETUNER, groups),
                )
            else:
                _core.count_statistics(trace.topk_ids, 32, True, True, 1)
            if heard.count(calls) > 3:  # one before, one after it
                break
    finally:
        done.set()
        sender.join()
        signal.signal(signal.SIGUSR1, before)
    assert heard.count(calls) > 3


@given(
    trace=traces(),
    topology=topologies,
    extra_slots=st.integers(0, 2),
    wire=st.sampled_from(Wire),
    homes=st.sampled_from(Homes),
    rule=st.sampled_from(ReplicaRule),
    seed=st.integers(0, 2**32 - 1),
)
def test_core_equals_the_readable_twin(
    trace, topology, extra_slots, wire, homes, rule, seed
):
    """Every count, wire, home and rule, with replicas and empty slots: equal."""
    if homes is Homes.RECORDED and topology.num_ranks != 4:
        homes = Homes.UNIFORM  # recorded homes are for 4 ranks
    rng = np.random.default_rng(seed)
    placement = random_placement(rng, trace, topology, extra_slots)
    asked = (trace, placement, wire, homes, rule, trace.sequence)
    expected, counted = reference.tally_routing(*asked), core_tally(*asked)
    assert counted.keys() == expected.keys()
    for name, array in expected.items():
        np.testing.assert_array_equal(counted[name], array, err_msg=name)


@pytest.mark.parametrize("per_node", [1, 4, 8])
@pytest.mark.parametrize("wire", list(Wire))
@pytest.mark.parametrize("rule", list(ReplicaRule))
def test_homes_of_wide_nodes_find_replicas_like_the_readable_twin(
    rng, wire, per_node, rule
):
    """Most homes of a node find the same replicas, and are counted together."""
    tokens = 60 if rule is ReplicaRule.MOETUNER else 20
    ids = random_ids(rng, tokens, 2, 24, 5, padding=0.1, skew=2.0)
    groups = rng.integers(0, 3, tokens).astype(np.int32)
    trace = make_trace(ids, 24)
    topology = Topology(num_ranks=16, ranks_per_node=per_node)
    for extra_slots in (0, 1, 4):
        placement = random_placement(rng, trace, topology, extra_slots)
        asked = (trace, placement, wire, Homes.UNIFORM, rule, groups)
        expected, counted = reference.tally_routing(*asked), core_tally(*asked)
        for name, array in expected.items():
            np.testing.assert_array_equal(counted[name], array, err_msg=name)


# Four ranks on two nodes, one expert each: expert e on rank e. One token, one layer,
# experts {1, 2, 3}, home rank 0.
#
#   dedup:      0 -> 1 inside node 0; one row to node 1, arriving at rank 2 (local index
#               of 0), which keeps it and passes it on to rank 3. So does the pipelined.
#   dedup_ranks, per_expert: 0 -> 1 inside; two rows between the nodes.
#   allgather:  around the ring, 0 -> 1 inside, 1 -> 2 between, 2 -> 3 inside.
HAND_COUNTED = {
    Wire.DEDUP: ([1, 0, 1, 0], [0, 1, 0, 1], [1, 0], [0, 1]),
    Wire.DEDUP_PIPELINED: ([1, 0, 1, 0], [0, 1, 0, 1], [1, 0], [0, 1]),
    Wire.DEDUP_RANKS: ([1, 0, 0, 0], [0, 1, 0, 0], [2, 0], [0, 2]),
    Wire.PER_EXPERT: ([1, 0, 0, 0], [0, 1, 0, 0], [2, 0], [0, 2]),
    Wire.ALLGATHER: ([1, 0, 1, 0], [0, 1, 0, 1], [1, 0], [0, 1]),
}


@pytest.mark.parametrize("wire", list(Wire))
def test_links_counted_by_hand(wire):
    ids = np.array([[[1, 2, 3]]], np.int16)
    trace = make_trace(ids, 4, home_rank=np.zeros(1, np.int16))
    placement = one_expert_per_rank()
    rows = tally(trace, placement, wire=wire, homes=Homes.RECORDED)
    egress, ingress, node_egress, node_ingress = HAND_COUNTED[wire]
    assert rows.rank_egress[0, 0].tolist() == egress
    assert rows.rank_ingress[0, 0].tolist() == ingress
    assert rows.node_egress[0, 0].tolist() == node_egress
    assert rows.node_ingress[0, 0].tolist() == node_ingress
    # The way back is the way there, reversed.
    assert rows.return_rank_egress[0, 0].tolist() == ingress
    assert rows.return_node_ingress[0, 0].tolist() == node_egress
    assert rows.distinct_ranks[0, 0] == 3
    assert rows.remote_nodes[0, 0] == 1


def test_follow_starts_where_the_first_expert_was():
    """Layer 0 on expert 3: at layer 1 expert 3 is local, expert 2 a neighbour."""
    ids = np.array([[[3, 0], [3, 2]]], np.int16)
    trace = make_trace(ids, 4, ranked=True)
    rows = tally(trace, one_expert_per_rank(2), homes=Homes.FOLLOW)
    assert rows.remote_ranks[0].tolist() == [1.5, 1]  # uniform over 4 homes: 2 * 3/4
    assert rows.traffic[1].tolist() == [[0] * 4, [0] * 4, [0] * 4, [0, 0, 1, 1]]


def test_replica_nearest_to_the_home_serves():
    """Expert 0 on ranks 0 and 2: homes 0, 1 use rank 0, homes 2, 3 use rank 2."""
    ids = np.zeros((4, 1, 1), np.int16)
    homes = np.array([0, 1, 2, 3], np.int16)
    trace = make_trace(ids, 2, home_rank=homes)
    placement = Placement(
        slot_experts=np.array([[0, 1, 0, -1]], np.int32),
        layer_ids=trace.layer_ids,
        num_experts=2,
        topology=Topology(num_ranks=4, ranks_per_node=2),
    )
    rows = tally(trace, placement, homes=Homes.RECORDED)
    assert rows.slot_rows[0, 0].tolist() == [2, 0, 2, 0]
    assert rows.node_egress.sum() == 0


def test_count_only_source_gives_loads_and_refuses_the_rest():
    counts = CountTrace(
        counts=np.array([[[4, 2, 1, 1]]]),
        num_tokens=np.array([4]),
        layer_ids=np.zeros(1, np.int32),
    )
    placement = one_expert_per_rank()
    rows = tally(counts, placement, wire=Wire.ALLGATHER)
    assert rows.slot_rows[0, 0].tolist() == [4, 2, 1, 1]
    # T (G - 1) / G over each link of the ring 0 -> 1 => 2 -> 3 => 0.
    assert rows.rank_ingress[0, 0].tolist() == [0, 3, 0, 3]
    assert rows.rank_egress[0, 0].tolist() == [3, 0, 3, 0]
    assert rows.node_ingress[0, 0].tolist() == [3, 3]
    assert rows.return_rank_egress[0, 0].tolist() == [0, 3, 0, 3]
    with pytest.raises(MissingStatisticsError, match="wire=dedup needs the experts"):
        tally(counts, placement)


def test_replicas_share_what_was_only_counted():
    counts = CountTrace(
        counts=np.array([[[6, 2]]]),
        num_tokens=np.array([8]),
        layer_ids=np.zeros(1, np.int32),
    )
    placement = Placement(
        slot_experts=np.array([[0, 1, 0, -1]], np.int32),
        layer_ids=counts.layer_ids,
        num_experts=2,
        topology=Topology(num_ranks=2, ranks_per_node=2),
    )
    rows = tally(counts, placement, wire=Wire.ALLGATHER)
    assert rows.slot_rows[0, 0].tolist() == [3, 2, 3, 0]
    assert rows.active_experts()[0, 0].tolist() == [2, 1]


def test_what_cannot_be_tallied_is_refused_by_name():
    ids = np.array([[[1, 2]]], np.int16)
    trace = make_trace(ids, 4)
    with pytest.raises(InvalidTraceError, match="no home_rank"):
        tally(trace, one_expert_per_rank(), homes=Homes.RECORDED)
    with pytest.raises(InvalidTraceError, match="record weights"):
        tally(trace, one_expert_per_rank(), homes=Homes.FOLLOW)
    with pytest.raises(InvalidPlacementError, match="another model"):
        tally(make_trace(ids, 5), one_expert_per_rank())
    with pytest.raises(ValueError, match=r"home_rank\[0\] = 9 is outside"):
        far = make_trace(ids, 4, home_rank=np.full(1, 9, np.int16))
        tally(far, one_expert_per_rank(), homes=Homes.RECORDED)


def one_expert_per_rank(num_layers=1):
    return Placement(
        slot_experts=np.tile(np.arange(4, dtype=np.int32), (num_layers, 1)),
        layer_ids=np.arange(num_layers, dtype=np.int32),
        num_experts=4,
        topology=Topology(num_ranks=4, ranks_per_node=2),
    )
