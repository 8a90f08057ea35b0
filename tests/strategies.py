"""Random traces, topologies and placements for property tests."""

import numpy as np
from hypothesis import strategies as st
from moetuner.placement import Placement
from moetuner.topology import Topology
from moetuner.trace import Trace


def random_ids(rng, num_tokens, num_layers, num_experts, top_k, padding=0.0, skew=1.0):
    """int16 [T, L, K] distinct experts per row, some of them padding."""
    noise = rng.gumbel(size=(num_tokens, num_layers, num_experts))
    liking = skew * rng.normal(size=(num_layers, num_experts))
    ids = np.argsort(-(noise + liking), axis=2)[..., :top_k].astype(np.int16)
    ids[rng.random(ids.shape) < padding] = -1
    return np.ascontiguousarray(ids)


def make_trace(ids, num_experts, **fields):
    return Trace(
        topk_ids=ids,
        num_experts=num_experts,
        layer_ids=np.arange(ids.shape[1], dtype=np.int32),
        **fields,
    )


@st.composite
def traces(draw, max_tokens=12, max_experts=9):
    """A small trace; the strongest expert is first, homes are recorded for 4 ranks."""
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    num_experts = draw(st.integers(4, max_experts))
    top_k = draw(st.integers(1, min(4, num_experts)))
    num_tokens = draw(st.integers(0, max_tokens))
    num_layers = draw(st.integers(1, 4))
    padding = draw(st.sampled_from([0.0, 0.3]))
    ids = random_ids(rng, num_tokens, num_layers, num_experts, top_k, padding)
    return make_trace(
        ids,
        num_experts,
        ranked=True,
        sequence=rng.integers(0, 3, num_tokens).astype(np.int32),
        home_rank=rng.integers(0, 4, num_tokens).astype(np.int16),
    )


def random_placement(rng, trace, topology, extra_slots=0):
    """Every expert once, at random; further slots hold replicas or nothing."""
    num_ranks = topology.num_ranks
    slots_per_rank = -(-trace.num_experts // num_ranks) + extra_slots
    slots = np.full((trace.num_layers, num_ranks, slots_per_rank), -1, np.int32)
    for layer in slots:
        free = [(g, s) for g in range(num_ranks) for s in range(slots_per_rank)]
        rng.shuffle(free)
        for expert in range(trace.num_experts):
            rank, slot = free.pop()
            layer[rank, slot] = expert
        for rank, slot in free:
            expert = rng.integers(-1, trace.num_experts)
            if expert not in layer[rank]:
                layer[rank, slot] = expert
    return Placement(
        slot_experts=slots.reshape(trace.num_layers, -1),
        layer_ids=trace.layer_ids,
        num_experts=trace.num_experts,
        topology=topology,
    )


topologies = st.sampled_from(
    [
        Topology(num_ranks=g, ranks_per_node=m)
        for g, m in [(1, 1), (2, 1), (2, 2), (4, 1), (4, 2), (4, 4)]
    ]
)
