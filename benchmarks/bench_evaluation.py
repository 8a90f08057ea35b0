"""Exact score of a placement on a long real trace, every wire and kind of home.

62,717 tokens x 24 layers x top-4 of 32 experts, 8 ranks on 2 nodes, two threads: less
than a second, also where replicas make a token's path depend on its home.
"""

import dataclasses

import harness
import numpy as np
import pytest
from moetuner.evaluation.cost import CostModel, Homes, Wire
from moetuner.evaluation.evaluate import evaluate, summarise
from moetuner.evaluation.tally import tally
from moetuner.placement.model import Placement, contiguous_rank_of
from moetuner.placement.topology import Topology
from moetuner.trace import read_trace

NUM_THREADS = 2
MAX_SECONDS = 1.0
TOPOLOGY = Topology(num_ranks=8, ranks_per_node=4)


@pytest.fixture(scope="module")
def trace():
    file = harness.traces_folder() / "gpt-oss-20b-fingerprinting" / "mmlu.npz"
    if not file.exists():
        pytest.skip(f"no real trace at {file}; set MOETUNER_TRACES")
    recorded = read_trace(file)
    homes = np.random.default_rng(0).integers(0, 8, recorded.num_tokens)
    return dataclasses.replace(recorded, home_rank=homes.astype(np.int16))


def make_placement(trace, replicas):
    """Contiguous blocks; with replicas, each rank also holds its neighbour's first."""
    placement = Placement.from_rank_of(
        contiguous_rank_of(trace.num_layers, trace.num_experts, TOPOLOGY.num_ranks),
        layer_ids=trace.layer_ids,
        topology=TOPOLOGY,
    )
    if not replicas:
        return placement
    slots = placement.slot_experts.reshape(trace.num_layers, TOPOLOGY.num_ranks, -1)
    copies = np.roll(slots[..., :1], 1, axis=1)
    wider = np.concatenate([slots, copies], axis=2).reshape(trace.num_layers, -1)
    return dataclasses.replace(placement, slot_experts=wider)


@pytest.mark.parametrize("replicas", [False, True], ids=["single", "replicas"])
@pytest.mark.parametrize("homes", Homes, ids=lambda homes: homes.value)
@pytest.mark.parametrize("wire", Wire, ids=lambda wire: wire.value)
def bench_evaluate(benchmark, trace, wire, homes, replicas):
    assert trace.num_tokens >= 60_000
    assert trace.num_layers == 24
    cost = CostModel(wire=wire, homes=homes)
    placement = make_placement(trace, replicas)

    def evaluate_on_two_threads():
        rows = tally(trace, placement, wire=wire, homes=homes, num_threads=NUM_THREADS)
        return summarise(rows.total(), cost)

    benchmark.group = f"evaluate {'replicas' if replicas else 'single'}"
    benchmark.extra_info["threads"] = NUM_THREADS
    score = benchmark.pedantic(evaluate_on_two_threads, rounds=5, warmup_rounds=1)
    everywhere = evaluate(trace, placement, cost)
    assert score.modelled_seconds == everywhere.modelled_seconds
    if not benchmark.disabled:
        assert benchmark.stats.stats.median < MAX_SECONDS
