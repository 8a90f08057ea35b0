"""A decoder on the ranks of a group, its experts under one variant after another.

Legend: L layers, G ranks, T tokens of a rank, K top-k, B sequences, V vocabulary.
"""

from __future__ import annotations

import time
from contextlib import contextmanager, nullcontext
from typing import TYPE_CHECKING, Any

import beside  # noqa: F401
import followed
import numpy as np
import torch
import torch.distributed as dist
from decoder import Cache, Decoder
from feeds import PROMPT, Replayed, Text
from moetuner.nn import GivenRouting, TopKRouter, replay_routing
from stacks import DrawnExperts, SlotWeights, Stack
from variants import FOLLOW, Variant

if TYPE_CHECKING:
    from collections.abc import Iterator

    from case import Case
    from clock import Marks, StepParts
    from place import Place
    from trained import TrainedExperts


class Bench:
    """The decoder on this rank, and its layers under every variant.

    Without `trained` weights are drawn and routing is replayed; with it the model is
    that, reads `text`, and routes by itself.
    """

    def __init__(
        self,
        case: Case,
        variants: list[Variant],
        place: Place,
        trained: TrainedExperts | None = None,
        text: Text | None = None,
    ) -> None:
        self.case, self.place = case, place
        self.feed = text or Replayed(case)
        like = torch.empty(0, device=place.device, dtype=getattr(torch, case.dtype))
        torch.manual_seed(0)  # the same attention on all ranks
        family, layers = case.family, case.layers
        with torch.device(place.device), default_dtype(like.dtype):
            self.decoder = Decoder(family, layers)
            routers = [
                TopKRouter(family.hidden, family.experts, family.top_k)
                for _ in range(layers)
            ]
        self.decoder.requires_grad_(False)
        slots = max(case.placements[v.placement].slots_per_rank for v in variants)
        weights = [SlotWeights(family, slots, like) for _ in range(layers)]
        self.source: Any = trained or DrawnExperts(family, like)
        if trained:
            trained.load(self.decoder, routers)
        self.like = like
        self.stacks = [
            Stack(v, case.placements[v.placement], self.decoder, routers, weights)
            for v in variants
        ]

    @property
    def routes_itself(self) -> bool:
        """Whether nobody tells the routers what to choose."""
        return isinstance(self.feed, Text)

    def cache(self, stack: Stack) -> Cache:
        sizes, sequences = self.case.sizes, self.case.sizes.sequences
        if stack.variant.exchange == FOLLOW:
            sequences *= dist.get_world_size()
        room = sizes.prompt + sizes.decode
        return Cache(self.case.family, self.case.layers, sequences, room, self.like)

    def steps(self, stack: Stack, batch: int) -> Iterator[Step]:
        """A prompt, and its decoded tokens one after another, each to be run."""
        cache = self.cache(stack)
        for step in range(PROMPT, self.case.sizes.decode):
            yield Step(self, stack, cache, batch, step)


@contextmanager
def default_dtype(dtype: torch.dtype) -> Iterator[None]:
    """What modules are made in: a cast afterwards needs both at once."""
    former = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(former)


class Step:
    """One step of a stack, ready to be run."""

    def __init__(
        self, bench: Bench, stack: Stack, cache: Cache, batch: int, step: int
    ) -> None:
        self.decoder, self.stack, self.cache = bench.decoder, stack, cache
        self.place, self.number = bench.place, step
        rank, device = dist.get_rank(), bench.place.device
        self.tokens = bench.feed.tokens(batch, step, rank).to(device)
        self.ids: torch.Tensor | None = None  # [L, G, T, K]
        if isinstance(bench.feed, Replayed):
            ids = np.ascontiguousarray(bench.feed.ids(batch, step))
            chosen = torch.from_numpy(ids).to(device).long()
            self.ids = chosen.permute(2, 0, 1, 3).contiguous()

    @property
    def phase(self) -> str:
        return "prefill" if self.number == PROMPT else "decode"

    def run(self) -> torch.Tensor:
        """Logits [B, V]."""
        if self.stack.variant.exchange == FOLLOW:
            return followed.forward(self.decoder, self.tokens, self.cache, self.ids)
        return self.decoder(self.tokens, self.cache)

    def given(self):
        """While it lasts, routers choose what was recorded."""
        if self.ids is None or self.stack.variant.exchange == FOLLOW:
            return nullcontext()  # where tokens move, their routing moves with them
        rank = dist.get_rank()
        routing = {
            moe.exchange.layer: GivenRouting(topk_ids=ids[rank])
            for moe, ids in zip(self.stack.layers, self.ids, strict=True)
        }
        return replay_routing(self.decoder, routing)

    def milliseconds(self) -> float:
        """On this rank, until the host has the next tokens."""
        with self.given():
            self.place.settle()
            begin = time.perf_counter()
            self.run().argmax(dim=-1).tolist()
            return (time.perf_counter() - begin) * 1e3

    def parts(self, marks: Marks) -> StepParts:
        with self.given():
            self.place.settle()
            marks.note("start")
            self.run().argmax(dim=-1)
            marks.note("end")
            return marks.take()
