"""DeepEP's kernels as methods of the benchmarks, inside a node; needs its wheel, 1.2.

Rows of the normal ones are by token. Our permute brings them to their experts, and our
unpermute makes the sums that they take back. The low-latency ones have a row for each
(token, expert) and room for all.
"""

from __future__ import annotations

import torch.distributed as dist
from methods import Method
from moetuner.ops import permute, unpermute

BUFFER_BYTES = int(2e9)  # as its own tests have it inside a node


class DeepEp(Method):
    """Its normal kernels."""

    def __init__(self, layer, inputs):
        from deep_ep import Buffer

        super().__init__(layer, "DeepEP normal + our permute", inputs)
        self.buffer = Buffer(dist.group.WORLD, BUFFER_BYTES, 0)

    def dispatch(self, x, ids, weights):
        experts = len(self.layer.slot_experts)
        to_rank, _, to_expert, goes, _ = self.buffer.get_dispatch_layout(ids, experts)
        rows, here, own_weights, _, handle, _ = self.buffer.dispatch(
            x,
            topk_idx=ids,
            topk_weights=weights,
            num_tokens_per_rank=to_rank,
            is_token_in_rank=goes,
            num_tokens_per_expert=to_expert,
        )
        placed = permute(rows, here, self.layer.slots_per_rank)
        self.state = {"map": placed.row_map, "weights": own_weights, "handle": handle}
        return placed.rows, placed.end_offsets

    def combine(self, done):
        sums = unpermute(done, self.state["map"], self.state["weights"])
        return self.buffer.combine(sums, self.state["handle"])[0]


class DeepEpLowLatency(Method):
    """Its low-latency kernels, for the tokens that `inputs` have."""

    def __init__(self, layer, inputs):
        from deep_ep import Buffer

        super().__init__(layer, "DeepEP low latency", inputs)
        num_ranks, experts = dist.get_world_size(), len(layer.slot_experts)
        size = Buffer.get_low_latency_rdma_size_hint(
            *inputs[0].shape, num_ranks, experts
        )
        self.buffer = Buffer(
            dist.group.WORLD,
            0,
            size,
            low_latency_mode=True,
            num_qps_per_rank=experts // num_ranks,
            allow_nvlink_for_low_latency_mode=True,
        )

    def dispatch(self, x, ids, weights):
        rows, counts, handle, _, _ = self.buffer.low_latency_dispatch(
            x, ids, len(x), len(self.layer.slot_experts), use_fp8=False
        )
        self.state = {"ids": ids, "weights": weights, "handle": handle}
        return rows, counts

    def combine(self, done):
        ids, weights, handle = self.state.values()
        return self.buffer.low_latency_combine(done, ids, weights, handle)[0]
