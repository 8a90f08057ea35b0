"""Homes of sequences by their routing: balanced, never slower on links, as informed."""

from dataclasses import replace

import numpy as np
import pytest
from moetuner.errors import InvalidProblemError, InvalidTraceError
from moetuner.evaluation.cost import CostModel, Homes, Wire
from moetuner.evaluation.evaluate import evaluate
from moetuner.evaluation.hardware import HARDWARE
from moetuner.placement.model import Placement
from moetuner.placement.topology import Topology
from moetuner.planning.request_affinity import (
    assign_homes,
    balanced,
    improve,
    link_seconds,
)
from moetuner.trace.split import sequence_index
from strategies import make_trace, random_placement

TOPOLOGY = Topology(num_ranks=4, ranks_per_node=2)


def clustered(rng, num_sequences=24):
    """Sequences that each keep to the four experts of one rank, after two tokens."""
    lengths = rng.integers(10, 30, num_sequences)
    rows = []
    for number, length in enumerate(lengths):
        own = 4 * (number % 4) + np.arange(4)
        tokens = [[rng.choice(own, 2, replace=False)] * 3 for _ in range(length)]
        tokens[0] = tokens[1] = [[0, 1]] * 3  # beginnings tell nothing
        rows += tokens
    sequence = np.repeat(np.arange(num_sequences), lengths).astype(np.int32)
    return make_trace(np.array(rows, np.int16), 16, sequence=sequence)


def blocks():
    experts = np.tile(np.arange(16, dtype=np.int32), (3, 1))

    return Placement(
        slot_experts=experts,
        layer_ids=np.arange(3, dtype=np.int32),
        num_experts=16,
        topology=TOPOLOGY,
    )


def seconds(trace, placement, cost):
    recorded = replace(cost, homes=Homes.RECORDED)
    return evaluate(trace, placement, recorded, batch_tokens=200).batch_seconds_mean


def test_what_is_known_decides_how_much_crosses(rng):
    slow = replace(HARDWARE["h100"], rank_bandwidth=1e9, nic_bandwidth=1e8)
    trace, cost = clustered(rng), CostModel(hardware=slow)
    times = {
        known: seconds(
            assign_homes(
                trace, blocks(), cost, known_tokens=known, batch_tokens=200, slack=0.3
            ),
            blocks(),
            cost,
        )
        for known in (0, 2, 8, None)
    }
    assert times[8] < 0.8 * times[0]
    assert times[None] < 0.8 * times[0]
    assert times[2] > times[8]


def test_a_sequence_has_one_home_and_ranks_are_balanced(rng):
    trace = assign_homes(clustered(rng, 100), blocks(), CostModel(), batch_tokens=0)
    homes = [
        np.unique(trace.home_rank[sequence_index(trace) == one]) for one in range(100)
    ]
    assert all(home.size == 1 for home in homes)
    tokens = np.bincount(trace.home_rank, minlength=4)
    assert tokens.max() <= 1.1 * trace.num_tokens / 4


@pytest.mark.parametrize("wire", list(Wire))
def test_links_add_up_to_what_the_evaluator_says(rng, wire):
    trace = clustered(rng, 9)
    placement = random_placement(rng, trace, TOPOLOGY)
    cost = CostModel(wire=wire)
    links = link_seconds(trace, placement, cost)
    home = rng.integers(0, 4, 9)
    busy = links[np.arange(9), home].sum(axis=0).max(axis=1).sum()
    homed = replace(trace, home_rank=home[sequence_index(trace)].astype(np.int16))
    score = evaluate(homed, placement, replace(cost, homes=Homes.RECORDED))
    latency = 2 * 3 * cost.hardware.node_latency
    expected = score.dispatch_seconds + score.combine_seconds - latency
    assert busy == pytest.approx(expected)


def test_improvements_end_where_no_change_helps_and_keep_the_share(rng):
    tokens = rng.integers(1, 20, 12)
    links = rng.random((12, 4, 2, 6))
    start = balanced(tokens, 4)
    most = 1.2 * np.bincount(start, weights=tokens).max()
    home = improve(start, links, tokens, most)

    def value(homes):
        return links[np.arange(12), homes].sum(axis=0).max(axis=1).sum()

    assert value(home) < value(start)
    for one in range(12):
        for rank in range(4):
            moved = home.copy()
            moved[one] = rank
            if np.bincount(moved, weights=tokens).max() <= most:
                assert value(moved) >= value(home) * (1 - 1e-9)
    assert np.bincount(home, weights=tokens).max() <= most


def test_what_makes_no_sense_is_refused(rng):
    trace = clustered(rng, 4)
    for wrong in ({"known_tokens": -1}, {"slack": -0.1}, {"batch_tokens": -1}):
        with pytest.raises(InvalidProblemError, match=next(iter(wrong))):
            assign_homes(trace, blocks(), CostModel(), **wrong)
    alone = replace(trace, sequence=None)
    with pytest.raises(InvalidTraceError, match="sequences"):
        assign_homes(alone, blocks(), CostModel())
