"""dispatch and combine in code of one's own, on the routing of the shipped trace.

Rows that travel are counted, and are as many as the evaluator predicts.
"""

import dataclasses

import numpy as np
import torch
import torch.distributed as dist
from moetuner import (
    Homes,
    Placement,
    PlacementTables,
    PlanOptions,
    Topology,
    demo_trace,
    plan_trace,
    split_by_sequence,
)
from moetuner.evaluation.tally import tally
from moetuner.ops import combine, dispatch
from moetuner.placement.model import contiguous_rank_of
from moetuner.trace import select
from start import say, start

HIDDEN, TOKENS = 64, 2048
rank, num_ranks, device = start()
topology = Topology(num_ranks=num_ranks, ranks_per_node=num_ranks)

# Planned on one half of the sequences, run on tokens of the other.
halves = split_by_sequence(demo_trace(), 0.5)
trace = select(halves.score, np.arange(halves.score.num_tokens) < TOKENS * num_ranks)
home_rank = (np.arange(trace.num_tokens) % num_ranks).astype(np.int16)
trace = dataclasses.replace(trace, home_rank=home_rank)
planned = plan_trace(halves.plan, topology, PlanOptions(solver="chain"))
contiguous = Placement.from_rank_of(
    contiguous_rank_of(trace.num_layers, trace.num_experts, num_ranks),
    layer_ids=trace.layer_ids,
    topology=topology,
)
group = dist.group.WORLD.group_name


def run_layers(placement):
    """Rows that left this rank, and the last layer's output."""
    tables = PlacementTables.of(placement, rank)
    mine = torch.from_numpy(np.flatnonzero(home_rank == rank))  # its own tokens
    ids = torch.from_numpy(trace.topk_ids.astype("int32"))[mine]
    weights = torch.from_numpy(trace.topk_weights.astype("float32"))[mine]
    x = torch.randn(TOKENS, HIDDEN, generator=torch.Generator().manual_seed(rank))
    x, rows_away = x.to(device), 0
    for layer in range(trace.num_layers):
        sent = dispatch(
            x,
            ids[:, layer].contiguous().to(device),
            weights[:, layer].contiguous().to(device),
            torch.from_numpy(tables.candidates[layer]).to(device),
            torch.from_numpy(tables.num_candidates[layer]).to(device),
            tables.slots_per_rank,
            group,
        )
        # Expert e of this made-up model multiplies by 1 + e / E.
        slots = torch.from_numpy(tables.local_experts[layer]).to(device)
        row = torch.arange(len(sent.rows), device=device, dtype=torch.int32)
        expert = slots[torch.searchsorted(sent.end_offsets, row, right=True)]
        done = sent.rows * (1 + expert / tables.num_experts)[:, None]
        x = combine(done, sent.handle)
        to_rank = sent.handle.splits[0]
        rows_away += int(to_rank.sum() - to_rank[rank])
    return rows_away, x


outputs = {}
for name, placement in {
    "contiguous": contiguous,
    "planned": planned.result.placement,
}.items():
    away, outputs[name] = run_layers(placement)
    total = torch.tensor(away, device=device)
    dist.all_reduce(total)
    traffic = tally(trace, placement, homes=Homes.RECORDED).traffic.sum(axis=0)
    predicted = int(traffic.sum() - np.trace(traffic))
    say(f"{name}: {int(total)} rows left a rank, predicted {predicted}")
torch.testing.assert_close(*outputs.values(), rtol=1e-4, atol=1e-4)
say("both give the same output")
dist.destroy_process_group()
