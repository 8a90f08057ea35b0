"""Ways to get tokens to their experts and back, each in three timed steps.

Legend: T tokens of a rank, K top-k, E experts, G ranks, S slots of a rank, H hidden.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from moetuner.nn import grouped_linear, return_home
from moetuner.nn.follow import follow_back
from moetuner.ops import combine, dispatch, unpermute
from moetuner.ops._collectives import group_named


@dataclass
class Layer:
    """One MoE layer on this rank: SwiGLU experts of its slots, bfloat16."""

    slot_experts: torch.Tensor  # int64 [P], on the CPU
    slots_per_rank: int
    gate_up: torch.Tensor  # [S, 2 I, H]
    down: torch.Tensor  # [S, H, I]

    def experts(self, rows: torch.Tensor, ends: torch.Tensor) -> torch.Tensor:
        gate, up = grouped_linear(rows, self.gate_up, ends).chunk(2, dim=-1)
        return grouped_linear(torch.nn.functional.silu(gate) * up, self.down, ends)


@dataclass
class Method:
    """`dispatch` -> rows and ends; `combine` -> sums. State passes through `self`."""

    layer: Layer
    name: str = ""
    inputs: tuple[torch.Tensor, ...] = ()
    """x [., H], ids int64 [., K] and weights [., K] of the tokens that are here."""
    rows_sent: int = 0
    """To other ranks by this one, in the last call."""
    rows_back: int | None = None
    """Afterwards, for this rank's tokens; None: as many as were sent."""
    state: dict[str, Any] = field(default_factory=dict)

    def at_home(self, out: Any) -> torch.Tensor:
        """What `combine` made, as [T, H] of the tokens that began here."""
        return out


class PerExpert(Method):
    """A row for each (token, expert): argsort, index_select, all_to_all_single.

    torchtitan's standard path and Transformers' own: split sizes are read on the host.
    Contiguous blocks of experts.
    """

    def dispatch(self, x, ids, weights):
        num_ranks, size = dist.get_world_size(), self.layer.slots_per_rank
        order = ids.flatten().argsort(stable=True)
        count = torch.bincount(ids.flatten(), minlength=num_ranks * size)
        arriving = torch.empty_like(count)
        dist.all_to_all_single(arriving, count)
        sent = count.view(num_ranks, size).sum(1)
        received = arriving.view(num_ranks, size).sum(1)
        sent, received = torch.stack([sent, received]).tolist()  # waits
        rows = x.index_select(0, order // ids.shape[1])
        come = rows.new_empty(sum(received), x.shape[1])
        dist.all_to_all_single(come, rows, received, sent)
        # From (sender, expert) to expert order.
        expert = torch.arange(size, device=x.device).repeat(num_ranks)
        by_expert = expert.repeat_interleave(arriving, output_size=len(come)).argsort(
            stable=True
        )
        ends = arriving.view(num_ranks, size).sum(0).cumsum(0).int()
        self.state = {"order": order, "by_expert": by_expert, "weights": weights}
        self.state |= {"sent": sent, "received": received, "T": len(x)}
        self.rows_sent = sum(sent) - sent[dist.get_rank()]
        return come.index_select(0, by_expert), ends

    def combine(self, done):
        s = self.state
        back = torch.empty_like(done)
        back[s["by_expert"]] = done
        home = done.new_empty(sum(s["sent"]), done.shape[1])
        dist.all_to_all_single(home, back, s["sent"], s["received"])
        by_token = torch.empty_like(home)
        by_token[s["order"]] = home
        by_token = by_token.view(s["T"], -1, done.shape[1])
        return torch.bmm(s["weights"].to(done.dtype)[:, None], by_token).squeeze(1)


class AllGather(Method):
    """Every row to every rank, sums by reduce-scatter.

    Rows for the experts here are selected by torch; the sums are our unpermute's.
    """

    def dispatch(self, x, ids, weights):
        num_ranks, rank = dist.get_world_size(), dist.get_rank()
        every = [t.new_empty(num_ranks * len(t), t.shape[1]) for t in (x, ids, weights)]
        for out, mine in zip(every, (x, ids, weights), strict=True):
            dist.all_gather_into_tensor(out, mine)
        size = self.layer.slots_per_rank
        slot = every[1].flatten() - rank * size
        here = ((slot >= 0) & (slot < size)).nonzero().flatten()  # waits
        mine, order = slot[here].sort(stable=True)
        choice = here[order]
        row_map = torch.full_like(slot, -1, dtype=torch.int32)
        row_map[choice] = torch.arange(len(choice), device=x.device, dtype=torch.int32)
        ends = torch.bincount(mine, minlength=size).cumsum(0).int()
        self.state = {"row_map": row_map.view(every[1].shape), "weights": every[2]}
        self.state["T"] = len(x)
        self.rows_sent = (num_ranks - 1) * len(x)
        return every[0].index_select(0, choice // ids.shape[1]), ends

    def combine(self, done):
        s = self.state
        sums = unpermute(done, s["row_map"], s["weights"])
        out = done.new_empty(s["T"], done.shape[1])
        dist.reduce_scatter_tensor(out, sums)
        return out


class Moetuner(Method):
    """dispatch and combine on the layer's slots; with sizes, the fixed form."""

    homes = "recorded"  # the evaluator's word for where tokens are
    form = ""

    def __init__(self, layer, placement="", inputs=(), sizes=None, *, nodes=None):
        form = ", fixed" if sizes else self.form
        levels = ", two levels" if nodes else ""
        super().__init__(layer, f"moetuner, {placement}{levels}{form}", inputs)
        self.nodes = nodes
        device = inputs[0].device if inputs else "cuda"
        self.placement = placement  # its name
        num_ranks = dist.get_world_size()
        self.sizes = sizes or {}
        slots = layer.slot_experts
        experts = int(slots.max()) + 1
        self.candidates = torch.full((experts, 1), -1, dtype=torch.int32)
        self.candidates[slots[slots >= 0], 0] = torch.arange(len(slots))[
            slots >= 0
        ].int()
        self.candidates = self.candidates.to(device)
        self.num_candidates = torch.ones(experts, dtype=torch.int32, device=device)
        self.group = dist.group.WORLD.group_name
        in_node = group_named(nodes.inside).size() if nodes else num_ranks
        passed_on = in_node if nodes else 0
        columns = 1 + num_ranks + num_ranks // in_node + len(slots) + passed_on
        self.counters = torch.zeros(columns, dtype=torch.int64, device=device)

    def dispatch(self, x, ids, weights):
        self.sent = dispatch(
            x,
            ids,
            weights,
            self.candidates,
            self.num_candidates,
            self.layer.slots_per_rank,
            self.group,
            nodes=self.nodes,
            counters=self.counters,
            **self.sizes,
        )
        return self.sent.rows, self.sent.end_offsets

    def combine(self, done):
        return combine(done, self.sent.handle)

    def count_rows(self):
        """Rows of one call by the counters: to each rank, int64 [G] on the CPU."""
        before = self.counters.clone()
        self.dispatch(*self.inputs)
        rows = (self.counters - before)[1 : 1 + dist.get_world_size()].cpu()
        self.rows_sent = int(rows.sum() - rows[dist.get_rank()])
        return rows


class Follow(Moetuner):
    """Tokens are, and end, where their first expert is: of the layer before, of this.

    ``keys`` int64 [U, 2] say where the tokens here began, as `moetuner.nn` has them.
    """

    homes = "follow"
    form = ", follow"

    def __init__(self, layer, placement, inputs, keys, num_tokens, nodes=None):
        super().__init__(layer, placement, inputs, nodes=nodes)
        self.keys, self.num_tokens = keys, num_tokens

    def dispatch(self, x, ids, weights):
        self.here = x, ids
        return super().dispatch(x, ids, weights)

    def combine(self, done):
        x, ids = self.here
        tables = (self.candidates, self.num_candidates, self.layer.slots_per_rank)
        return follow_back(x, ids, self.keys, self.sent, done, tables)

    def at_home(self, out):
        return return_home(out.sums, out.keys, self.num_tokens, self.group)

    def count_rows(self):
        rows = super().count_rows()
        # A part from each rank that a token visits, but the one where it ends.
        self.rows_back = int(rows.sum()) - len(self.keys)
        return rows
