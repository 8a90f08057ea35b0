"""Tiny problems of every wire, home, batch and machine, small enough for the oracle."""

from dataclasses import replace

import numpy as np
from hypothesis import strategies as st
from moetuner.evaluation.cost import CostModel, Homes, Wire
from moetuner.evaluation.hardware import HARDWARE
from moetuner.evaluation.models import ModelShape
from moetuner.evaluation.workload import BatchKind, Workload
from moetuner.placement.topology import Topology
from moetuner.problem import PlacementProblem
from strategies import machines, make_trace, random_ids

# Latency, links, arithmetic and weights that weigh about the same on toy traces.
SHAPES = [
    ModelShape(hidden_size=64, expert_hidden_size=8),
    ModelShape(hidden_size=64, expert_hidden_size=2, combine_bytes=4),
    ModelShape(hidden_size=8, expert_hidden_size=512),
]


@st.composite
def tiny_problems(draw, spare=0):
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    num_ranks, per_node = draw(
        st.sampled_from([(2, 1), (2, 2), (4, 2), (3, 1), (3, 3), (1, 1)])
    )
    num_experts = draw(st.integers(num_ranks, {3: 5, 4: 4}.get(num_ranks, 6)))
    num_layers = draw(st.integers(1, 2))
    top_k = draw(st.integers(1, min(4, num_experts)))
    num_tokens = draw(st.sampled_from([0, 1, 6, 40]))
    padding = draw(st.sampled_from([0.0, 0.2]))
    count = draw(st.integers(1, 2))
    traces = []
    for _ in range(count):
        ids = random_ids(
            rng, num_tokens, num_layers, num_experts, top_k, padding, skew=2.0
        )
        traces.append(
            make_trace(
                ids,
                num_experts,
                ranked=True,
                home_rank=rng.integers(0, num_ranks, num_tokens).astype(np.int16),
            )
        )
    hardware = replace(
        HARDWARE["h100"],
        rank_latency=draw(st.sampled_from([0.0, 2e-9])),
        node_latency=draw(st.sampled_from([1e-9, 5e-9])),
        nic_bandwidth=draw(st.sampled_from([50e9, 1e12])),
    )
    topology = Topology(num_ranks=num_ranks, ranks_per_node=per_node)
    hardware = draw(machines(hardware, topology))
    speeds = draw(st.sampled_from([(), tuple(rng.uniform(0.5, 2, num_ranks))]))
    workload = Workload(
        traces=tuple(traces),
        cost=CostModel(
            hardware=hardware,
            shape=draw(st.sampled_from(SHAPES)),
            wire=draw(st.sampled_from(Wire)),
            homes=draw(st.sampled_from(Homes)),
            rank_speeds=speeds,
        ),
        batch_tokens=draw(st.sampled_from([0, 5, 13])),
        batch_kind=draw(st.sampled_from(BatchKind)),
        worst_case=draw(st.booleans()),
    )
    least = -(-num_experts // num_ranks)
    problem = PlacementProblem.from_workload(
        workload,
        topology,
        slots_per_rank=least + spare,
    )
    return problem, rng
