"""DeepEP's normal kernels as a method of the benchmarks; needs its wheel.

Its rows are by token. Our permute brings them to their experts, and our unpermute makes
the sums that it takes back.
"""

from __future__ import annotations

import torch.distributed as dist
from methods import Method
from moetuner.ops import permute, unpermute

BUFFER_BYTES = int(2e9)  # as its own tests have it inside a node


class DeepEp(Method):
    """`deep_ep.Buffer` of DeepEP 1.2, inside a node."""

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
