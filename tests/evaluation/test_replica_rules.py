"""Each engine's rule by hand, and what rules promise together."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from moetuner.evaluation.cost import Homes, Wire
from moetuner.evaluation.replica_rule import (
    ReplicaRule,
    in_order,
    rank_slots,
    slot_shares,
)
from moetuner.evaluation.tally import tally
from moetuner.placement.model import Placement
from moetuner.placement.topology import Topology
from moetuner.trace import CountTrace
from strategies import make_trace, random_placement, topologies, traces

FOUR = Topology(num_ranks=4, ranks_per_node=2)


def placement_of(rows, topology=FOUR, layer_ids=None):
    slots = np.array(rows, np.int32)
    return Placement(
        slot_experts=slots,
        layer_ids=np.arange(len(slots), dtype=np.int32)
        if layer_ids is None
        else np.array(layer_ids, np.int32),
        num_experts=int(slots.max()) + 1,
        topology=topology,
    )


# Expert 0 in slots 0, 2, 4 and 6, on every rank; 1, 2 and 3 once.
EVERYWHERE = placement_of([[0, 1, 0, 2, 0, 3, 0, -1]])
# Expert 0 on rank 0 alone of node 0, and on both ranks of node 1.
THREE = placement_of([[0, 1, 2, 3, 0, -1, 0, -1]])

# Eight ranks of three slots, two layers; each rank's slot of each expert, [8, 2, 8].
SGLANG_MAP = [
    [6, 0, 7, 4, 3, 2, 5, 7, 2, 6, 3, 1, 0, 6, 7, 2, 3, 0, 6, 1, 7, 5, 1, 6],
    [5, 1, 0, 7, 1, 6, 2, 4, 0, 5, 7, 0, 6, 3, 4, 4, 3, 5, 6, 7, 5, 0, 6, 3],
]
SGLANG_SLOTS = [
    [[1, 11, 5, 4, 3, 21, 0, 2], [2, 1, 6, 13, 15, 0, 5, 3]],
    [[1, 22, 5, 4, 3, 6, 0, 2], [2, 4, 6, 23, 7, 0, 5, 3]],
    [[17, 11, 8, 10, 3, 6, 9, 7], [8, 4, 6, 16, 7, 9, 12, 10]],
    [[12, 11, 8, 10, 3, 6, 9, 7], [11, 1, 6, 23, 7, 9, 5, 10]],
    [[12, 11, 15, 16, 3, 6, 13, 14], [8, 1, 6, 13, 14, 17, 12, 10]],
    [[17, 19, 15, 16, 3, 21, 13, 14], [11, 1, 6, 16, 15, 17, 12, 19]],
    [[17, 19, 15, 16, 3, 21, 18, 20], [21, 4, 6, 23, 7, 20, 18, 19]],
    [[1, 22, 5, 4, 3, 21, 23, 20], [21, 4, 6, 23, 14, 20, 22, 19]],
]


def rows_of(placement, rule, home_rank, ids=None, groups=None):
    """Rows of each slot of layer 0 where tokens, one after another, choose expert 0."""
    ids = np.zeros((len(home_rank), 1, 1), np.int16) if ids is None else ids
    trace = make_trace(
        ids, placement.num_experts, home_rank=np.array(home_rank, np.int16)
    )
    told = tally(
        trace,
        placement,
        homes=Homes.RECORDED,
        replica_rule=rule,
        groups=None if groups is None else np.array(groups, np.int32),
    )
    return told.slot_rows[:, 0].sum(axis=0).astype(int).tolist()


def test_vllm_hashes_the_row_in_the_batch_of_a_rank():
    """2654435769 is 1 modulo 8: replicas take turns where they are 2, 4 or 8."""
    assert rows_of(EVERYWHERE, ReplicaRule.VLLM, [0] * 4) == [1, 0, 1, 0, 1, 0, 1, 0]
    # Each rank begins at row 0, and so does each batch: then all take the first one.
    assert rows_of(EVERYWHERE, ReplicaRule.VLLM, [0, 1, 2, 3])[0] == 4
    batches = [0, 1, 2, 3]
    assert rows_of(EVERYWHERE, ReplicaRule.VLLM, [0] * 4, groups=batches)[0] == 4
    # Of three replicas by hand: t * 2654435769 mod 2^32 mod 3 for t = 0..5.
    hashed = [t * 2654435769 % 2**32 % 3 for t in range(6)]
    wanted = [hashed.count(i) for i in range(3)]
    found = rows_of(THREE, ReplicaRule.VLLM, [1] * 6)
    assert [found[0], found[4], found[6]] == wanted == [3, 1, 2]


def test_vllm_ascend_goes_by_the_rank():
    assert rows_of(THREE, ReplicaRule.VLLM_ASCEND, [0, 3, 1, 2, 2]) == [
        *(2, 0, 0, 0, 1, 0, 2, 0)
    ]


def test_tensorrt_llm_takes_turns_among_the_choices_of_an_expert():
    """Tokens that choose another expert are no turn; ranks begin one further on."""
    ids = np.array([0, 1, 0, 1, 0], np.int16)[:, None, None]
    assert rows_of(THREE, ReplicaRule.TENSORRT_LLM, [0] * 5, ids) == [
        *(1, 2, 0, 0, 1, 0, 1, 0)
    ]
    assert rows_of(THREE, ReplicaRule.TENSORRT_LLM, [2])[6] == 1


def test_tensorrt_llm_counts_blocks_of_1024_choices():
    """The first choice of the second block takes the second replica again."""
    home = [0] * 1025
    first = rows_of(THREE, ReplicaRule.TENSORRT_LLM, home[:1024])
    assert [first[0], first[4], first[6]] == [342, 341, 341]
    both = rows_of(THREE, ReplicaRule.TENSORRT_LLM, home)
    assert [both[0], both[4], both[6]] == [342, 342, 341]


def test_sglang_static_as_the_engine_has_it():
    """Made by compute_logical_to_rank_dispatch_physical_map of SGLang 0.5.23."""
    placement = placement_of(SGLANG_MAP, Topology(num_ranks=8, ranks_per_node=2))
    assert rank_slots(placement).transpose(1, 0, 2).tolist() == SGLANG_SLOTS


def test_sglang_static_draws_for_layers_without_experts_too():
    """A file has rows of all hidden layers: one before the plan draws first."""
    rows = SGLANG_MAP[1:]
    topology = Topology(num_ranks=8, ranks_per_node=2)
    later = placement_of(rows, topology, layer_ids=[1])
    plain = in_order(later).tolist()
    whole = placement_of([plain, *rows], topology)
    assert rank_slots(later)[0].tolist() == rank_slots(whole)[1].tolist()


def test_sglang_dynamic_draws_evenly_and_always_the_same():
    rows = [rows_of(THREE, ReplicaRule.SGLANG_DYNAMIC, [0] * 9000) for _ in range(2)]
    assert rows[0] == rows[1]
    np.testing.assert_allclose(np.array(rows[0])[[0, 4, 6]], 3000, rtol=0.05)


@pytest.mark.parametrize("rule", list(ReplicaRule))
def test_one_token_reads_one_replica_whatever_its_home(rule):
    """Rows are expectations over homes, but experts are active or they are not."""
    trace = make_trace(np.zeros((1, 1, 1), np.int16), 4)
    told = tally(trace, THREE, replica_rule=rule)
    assert told.slot_rows[0, 0].sum() == 1
    # Ours has always counted each that some home would choose.
    wanted = 3 if rule is ReplicaRule.MOETUNER else 1
    assert told.active_experts()[0, 0].sum() == wanted
    assert told.total().active_experts()[0, 0].sum() == wanted


@given(
    trace=traces(),
    topology=topologies,
    wire=st.sampled_from(Wire),
    seed=st.integers(0, 2**32 - 1),
)
def test_without_replicas_all_rules_are_one(trace, topology, wire, seed):
    placement = random_placement(np.random.default_rng(seed), trace, topology)
    told = [
        tally(trace, placement, wire=wire, replica_rule=rule, groups=trace.sequence)
        for rule in ReplicaRule
    ]
    if placement.has_replicas:  # its spare slots may hold some
        return
    for each in told[1:]:
        np.testing.assert_array_equal(each.slot_rows, told[0].slot_rows)
        np.testing.assert_array_equal(each.rank_ingress, told[0].rank_ingress)


@given(topology=topologies, seed=st.integers(0, 2**32 - 1))
@pytest.mark.parametrize("rule", list(ReplicaRule))
def test_counts_are_shared_as_tokens_of_even_homes_are(rule, topology, seed):
    """Exactly by rules that go by the rank; on average by the others."""
    rng = np.random.default_rng(seed)
    ids = np.tile(np.arange(5, dtype=np.int16), 1200)[:, None, None]
    trace = make_trace(ids, 5)
    placement = random_placement(rng, trace, topology, 2)
    share = slot_shares(placement, rule)
    sums = np.zeros(5)
    np.add.at(sums, placement.slot_experts[0].clip(0), share[0])
    np.testing.assert_allclose(sums, 1)
    if rule is ReplicaRule.MOETUNER:
        return  # an even share, where tokens stay on their rank
    told = tally(trace, placement, replica_rule=rule)
    exact = rule in (ReplicaRule.SGLANG_STATIC, ReplicaRule.VLLM_ASCEND)
    np.testing.assert_allclose(
        told.slot_rows[0] / 1200, share, atol=1e-12 if exact else 0.05
    )


def test_counts_under_a_rule():
    counts = CountTrace(
        counts=np.array([[[12, 4, 4, 4]]]),
        num_tokens=np.array([24]),
        layer_ids=np.zeros(1, np.int32),
    )
    for rule, wanted in (
        (ReplicaRule.VLLM, [4, 4, 4]),
        (ReplicaRule.VLLM_ASCEND, [6, 3, 3]),
    ):
        told = tally(counts, THREE, wire=Wire.ALLGATHER, replica_rule=rule)
        assert told.slot_rows[0, 0, [0, 4, 6]].tolist() == wanted
