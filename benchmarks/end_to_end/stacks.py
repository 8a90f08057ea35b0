"""The same MoE layer on three exchanges, and its weights wherever a placement wants.

Legend: T tokens, K top-k, E experts, G ranks, N nodes, S slots of a rank, P slots, L
layers, H hidden, I inner.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import beside  # noqa: F401
import torch
import torch.distributed as dist
from methods import AllGather, Layer, PerExpert
from moetuner.nn import (
    Exchange,
    ExchangeOptions,
    Experts,
    Levels,
    MoELayer,
    Residency,
)
from moetuner.ops import unpermute
from moetuner.ops._collectives import slots_of
from torch import nn
from variants import ALL_GATHER, FOLLOW, OURS, PER_EXPERT

if TYPE_CHECKING:
    from families import Family
    from moetuner import Placement
    from variants import Variant


class GatherAll(AllGather):
    """Every row to every rank, sums by reduce-scatter."""

    def combine(self, done):
        if dist.get_backend() != "gloo":
            return super().combine(done)
        # Gloo's own is an all-reduce, which sends twice as much.
        s = self.state
        sums = unpermute(done, s["row_map"], s["weights"])
        parts = torch.empty_like(sums)
        dist.all_to_all_single(parts, sums)
        return parts.view(dist.get_world_size(), s["T"], -1).sum(0)


PLAIN = {PER_EXPERT: PerExpert, ALL_GATHER: GatherAll}


class PlainExchange(Exchange):
    """A baseline's exchange, under any placement: to it experts are slots.

    Its counters say what it sends: a row for each choice, or every row to every rank.
    They are kept only while `counting`, as no baseline counts. Blocks of experts need
    no look at tables either.
    """

    counting = False

    def __init__(self, kind: str, placement: Placement, **known) -> None:
        one = ExchangeOptions(levels=Levels.ONE)
        super().__init__(placement, options=one, **known)
        none = torch.empty(0)
        slots = torch.from_numpy(placement.slot_experts[0].astype("int64"))
        layer = Layer(slots, placement.slots_per_rank, none, none)
        self.kind, self.method = kind, PLAIN[kind](layer)
        own = placement.slot_experts[self.tables.row_of(self.layer)]
        self.in_blocks = own.tolist() == list(range(placement.num_experts))

    def forward(self, x, topk_ids, topk_weights, run_experts):
        slots = topk_ids
        if not self.in_blocks:
            slots = slots_of(topk_ids, self.candidates, self.num_candidates)
        rows, ends = self.method.dispatch(x, slots, topk_weights)
        if self.counting:
            self.count(slots, x)
        return self.method.combine(run_experts(rows, ends))

    def count(self, slots: torch.Tensor, x: torch.Tensor) -> None:
        """Into columns as ours have: tokens, rows to ranks, to nodes, choices."""
        topology = self.placement.topology
        num_ranks, num_nodes = topology.num_ranks, topology.num_nodes
        choices = torch.bincount(slots.flatten(), minlength=self.placement.num_slots)
        to_rank = choices.view(num_ranks, -1).sum(1)
        if self.kind == ALL_GATHER:
            to_rank = torch.full_like(to_rank, len(x))
        to_node = to_rank.view(num_nodes, -1).sum(1)
        tokens = choices.new_tensor([len(x)])
        self.row_bytes = x.shape[-1] * x.element_size()
        self.counters += torch.cat([tokens, to_rank, to_node, choices])


class NormFirst(nn.Module):
    """A module on normed rows. Tokens that move have to travel as they are."""

    def __init__(self, norm: nn.Module, module: nn.Module) -> None:
        super().__init__()
        self.norm, self.module = norm, module

    def forward(self, rows: torch.Tensor, *rest, **named):
        return self.module(self.norm(rows), *rest, **named)


class NormedRouter(NormFirst):
    """Says by its signature that it can be given experts."""

    def forward(self, rows: torch.Tensor, topk_ids: torch.Tensor | None = None):
        return self.module(self.norm(rows), topk_ids=topk_ids)


class SlotWeights:
    """Memory for the experts of a layer's slots, filled anew for each placement."""

    def __init__(self, family: Family, slots: int, like: torch.Tensor) -> None:
        self.up = like.new_empty(slots, 2 * family.inner, family.hidden)
        self.down = like.new_empty(slots, family.hidden, family.inner)

    def experts(self, slots: int) -> Experts:
        """Experts that compute with the first so many of them."""
        _, hidden, inner = self.down.shape
        made = Experts(slots, hidden, inner, device="meta")
        made.up = nn.Parameter(self.up[:slots], requires_grad=False)
        made.down = nn.Parameter(self.down[:slots], requires_grad=False)
        return made


class DrawnExperts:
    """Weights of any expert of any layer, the same on every rank and quickly made.

    An expert is one matrix of random numbers, its rows turned by a number of its own.
    In a layer no two are alike, if there are no more experts than rows.
    """

    def __init__(self, family: Family, like: torch.Tensor, seed: int = 0) -> None:
        rng = torch.Generator(like.device).manual_seed(seed)
        hidden, inner = family.hidden, family.inner
        self.up = like.new_empty(2 * inner, hidden)
        self.up.normal_(std=hidden**-0.5, generator=rng)
        self.down = like.new_empty(hidden, inner)
        self.down.normal_(std=inner**-0.5, generator=rng)
        self.experts = family.experts

    def copy(self, layer: int, expert: int, up: torch.Tensor, down: torch.Tensor):
        """Into those two matrices."""
        for own, target in ((self.up, up), (self.down, down)):
            turn = (layer * self.experts + expert + 1) % len(own)
            target[: len(own) - turn] = own[turn:]
            target[len(own) - turn :] = own[:turn]


class Stack:
    """The MoE layers of a decoder under one variant."""

    def __init__(
        self,
        variant: Variant,
        placement: Placement,
        decoder: nn.Module,
        routers: list[nn.Module],
        weights: list[SlotWeights],
    ) -> None:
        self.variant, self.placement = variant, placement
        self.weights, self.decoder = weights, decoder
        self.layers = [
            self._layer(number, router, block.expert_norm)
            for number, (router, block) in enumerate(
                zip(routers, decoder.blocks, strict=True)
            )
        ]

    def _layer(self, number: int, router: nn.Module, norm: nn.Module) -> MoELayer:
        placement, kind = self.placement, self.variant.exchange
        experts: nn.Module = self.weights[number].experts(placement.slots_per_rank)
        options = None
        if kind == FOLLOW:
            router, experts = NormedRouter(norm, router), NormFirst(norm, experts)
            options = ExchangeOptions(residency=Residency.FOLLOW)
        named = int(placement.layer_ids[number])
        made = MoELayer(router, experts, placement, layer=named, options=options)
        if kind in PLAIN:
            device = self.weights[number].up.device
            made.exchange = PlainExchange(kind, placement, layer=named, device=device)
        return made

    def count(self, wanted: bool) -> None:
        """Begin counting at zero; or let baselines count no longer."""
        for moe in self.layers:
            moe.exchange.counting = wanted
            if wanted:
                moe.exchange.reset()

    def install(self, source) -> None:
        """Make the decoder run this one: its layers, and the weights of its slots."""
        rank = self.layers[0].exchange.tables.rank
        size = self.placement.slots_per_rank
        mine = self.placement.slot_experts[:, rank * size : (rank + 1) * size]
        for number, (block, moe) in enumerate(
            zip(self.decoder.blocks, self.layers, strict=True)
        ):
            block.moe = moe
            own = self.weights[number]
            for slot, expert in enumerate(mine[number].tolist()):
                if expert >= 0:
                    source.copy(number, expert, own.up[slot], own.down[slot])

    def describe(self) -> str:
        """What carries its tokens, in words."""
        if self.variant.exchange in (OURS, FOLLOW):
            return self.layers[0].exchange.describe()
        return PLAIN[self.variant.exchange].__doc__.strip().splitlines()[0]
