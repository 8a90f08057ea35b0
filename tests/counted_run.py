"""Runs of an exchange, counted by a plain loop over tokens."""

import numpy as np
from moetuner.evaluation.verify import ExchangeRecord
from moetuner.placement.tables import PlacementTables, fingerprint
from strategies import make_trace, random_ids


def make_run(rng, num_ranks, num_experts=9, num_layers=2, steps=3):
    """Steps of uneven length on every rank, tokens in no order."""
    step, row, home = [], [], []
    for number in range(steps):
        for rank in range(num_ranks):
            count = int(rng.integers(0, 6))
            step += [number * num_ranks + rank] * count
            row += range(count)
            home += [rank] * count
    order = rng.permutation(len(step))
    ids = random_ids(rng, len(step), num_layers, num_experts, 3, padding=0.2)
    return make_trace(
        ids,
        num_experts,
        sequence=np.array(step, np.int32)[order],
        position=np.array(row, np.int32)[order],
        home_rank=np.array(home, np.int16)[order],
    )


def count(trace, placement):
    """What `dispatch` counts, token by token."""
    topology, size = placement.topology, placement.slots_per_rank
    num_ranks, num_nodes = topology.num_ranks, topology.num_nodes
    width = 1 + num_ranks + num_nodes + placement.num_slots
    counts = np.zeros((trace.num_layers, num_ranks, width), np.int64)
    tables = [PlacementTables.of(placement, rank) for rank in range(num_ranks)]
    for token, layer in np.ndindex(trace.num_tokens, trace.num_layers):
        rank, row = int(trace.home_rank[token]), int(trace.position[token])
        slots = []
        for expert in trace.topk_ids[token, layer]:
            if expert >= 0:
                among = tables[rank].num_candidates[layer, expert]
                slots.append(tables[rank].candidates[layer, expert, row % among])
        line = counts[layer, rank]
        line[0] += 1
        for other in {slot // size for slot in slots}:
            line[1 + other] += 1
        for node in {slot // size // topology.ranks_per_node for slot in slots}:
            line[1 + num_ranks + node] += 1
        for slot in slots:
            line[1 + num_ranks + num_nodes + slot] += 1
    return counts


def record_of(counts, placement):
    return ExchangeRecord(
        counts=counts,
        layer_ids=placement.layer_ids,
        placement_fingerprint=fingerprint(placement),
    )
