"""Runs a case on the ranks of a group: a rehearsal that checks, then repetitions.

Legend: L layers, G ranks, T tokens of a rank, K top-k, B sequences, S tokens of a
prompt, V vocabulary.
"""

from __future__ import annotations

import time
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import beside  # noqa: F401
import followed
import numpy as np
import told
import torch
import torch.distributed as dist
from clock import Marks, StepParts
from decoder import Cache, Decoder
from moetuner.nn import GivenRouting, TopKRouter, gather_counts, replay_routing
from stacks import DrawnExperts, SlotWeights, Stack
from variants import FOLLOW, OURS, PER_EXPERT, Variant

if TYPE_CHECKING:
    from case import Case
    from numpy.typing import NDArray
    from place import Place

SAME = 0.05  # of the norm of the logits: sums are taken in another order
EXACT = 1e-4  # the same in float32


@dataclass(frozen=True, kw_only=True)
class Limits:
    """How long: repetitions, and seconds after which no other is begun."""

    repeats: int
    seconds: float
    parts: int
    """Repetitions that time parts, after the others."""


@dataclass(frozen=True, kw_only=True)
class Turn:
    """Milliseconds of one repetition, slowest rank."""

    prefill: float
    decode: list[float]


class Bench:
    """The decoder on this rank, and its layers under every variant."""

    def __init__(self, case: Case, variants: list[Variant], place: Place) -> None:
        self.case, self.place = case, place
        self.batches = case.batches()
        like = torch.empty(0, device=place.device, dtype=getattr(torch, case.dtype))
        torch.manual_seed(0)  # the same attention on all ranks
        family, layers = case.family, case.layers
        with torch.device(place.device):
            self.decoder = Decoder(family, layers).to(like.dtype)
            routers = [
                TopKRouter(family.hidden, family.experts, family.top_k).to(like.dtype)
                for _ in range(layers)
            ]
        self.decoder.requires_grad_(False)
        slots = max(case.placements[v.placement].slots_per_rank for v in variants)
        weights = [SlotWeights(family, slots, like) for _ in range(layers)]
        self.source: Any = DrawnExperts(family, like)
        self.like = like
        self.stacks = [
            Stack(v, case.placements[v.placement], self.decoder, routers, weights)
            for v in variants
        ]

    def tokens(self, batch: int, step: int, shape: tuple[int, ...]) -> torch.Tensor:
        """What this rank's model reads: drawn, the same under every variant."""
        seed = (batch * 1000 + step) * dist.get_world_size() + dist.get_rank()
        rng = torch.Generator().manual_seed(seed)
        drawn = torch.randint(self.case.family.vocabulary, shape, generator=rng)
        return drawn.to(self.place.device)

    def cache(self, stack: Stack) -> Cache:
        sizes, sequences = self.case.sizes, self.case.sizes.sequences
        if stack.variant.exchange == FOLLOW:
            sequences *= dist.get_world_size()
        room = sizes.prompt + sizes.decode
        return Cache(self.case.family, self.case.layers, sequences, room, self.like)

    def steps(self, stack: Stack, batch: int):
        """A prompt, and its decoded tokens one after another, each to be run."""
        sizes, cache = self.case.sizes, self.cache(stack)
        for step in range(-1, sizes.decode):
            prompt = step < 0
            ids = self.batches.prefill(batch)
            if not prompt:
                ids = self.batches.decoded(batch, step)
            shape = (sizes.sequences, sizes.prompt if prompt else 1)
            tokens = self.tokens(batch, step, shape)
            yield Step(self, stack, cache, tokens, ids)


class Step:
    """One step of a stack, ready to be run."""

    def __init__(
        self,
        bench: Bench,
        stack: Stack,
        cache: Cache,
        tokens: torch.Tensor,
        ids: NDArray[np.int16],
    ) -> None:
        self.decoder, self.stack, self.cache = bench.decoder, stack, cache
        self.tokens, self.place = tokens, bench.place
        chosen = torch.from_numpy(np.ascontiguousarray(ids)).to(bench.place.device)
        self.ids = chosen.long().permute(2, 0, 1, 3).contiguous()  # [L, G, T, K]

    def run(self) -> torch.Tensor:
        """Logits [B, V]."""
        if self.stack.variant.exchange == FOLLOW:
            return followed.forward(self.decoder, self.tokens, self.cache, self.ids)
        return self.decoder(self.tokens, self.cache)

    def given(self):
        """While it lasts, routers choose what was recorded."""
        if self.stack.variant.exchange == FOLLOW:
            return nullcontext()  # tokens move, and their routing with them
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


def rehearse(bench: Bench) -> list[dict[str, Any]]:
    """Every variant once: outputs must agree, counters must be as predicted."""
    first: list[torch.Tensor] = []
    found = []
    for stack in bench.stacks:
        stack.install(bench.source)
        outputs, result = [], {"how": stack.describe()}
        for number, step in enumerate(bench.steps(stack, 0)):
            phase = "decode" if number else "prefill"
            if number > 1:  # one of each is counted
                with step.given():
                    outputs.append(step.run().float())
                continue
            for moe in stack.layers:
                moe.exchange.reset()
            with step.given():
                bench.place.settle()
                before = bench.place.sent_bytes()
                bench.place.settle()
                outputs.append(step.run().float())
                bench.place.settle()
                after = bench.place.sent_bytes()
            result[phase] = counted(bench, stack, number) | {
                "link_bytes": max(bench.place.gather(after - before))
            }
        first = first or outputs
        result["difference"] = check_same(bench, stack, first, outputs)
        found.append(result)
    return found


def counted(bench: Bench, stack: Stack, number: int) -> dict[str, Any]:
    """Rows of one step by the counters; raises where they are not those predicted."""
    counts = gather_counts(bench.decoder).counts
    batches, placement = bench.batches, stack.placement
    ids = batches.decoded(0, number - 1) if number else batches.prefill(0)
    seen, rows = told.rows(stack.variant, placement.topology, counts)
    said = told.traffic(stack.variant, placement, batches.as_trace([ids]))
    if not np.array_equal(seen, np.rint(said)):
        raise SystemExit(f"{stack.variant.name}: rows are not those predicted")
    return asdict(rows) | {"node_bytes": payload_bytes(bench, stack, rows)}


def payload_bytes(bench: Bench, stack: Stack, rows: told.Rows) -> int | None:
    """Out of a node, mean over nodes; None where a collective takes its own ways.

    What goes out comes back; with ours slots and weights ride along on the way out.
    """
    kind, family = stack.variant.exchange, bench.case.family
    if kind not in (OURS, PER_EXPERT):
        return None
    row = family.hidden * bench.like.element_size()
    along = 8 * family.top_k if kind == OURS else 0
    total = rows.out_of_nodes * (2 * row + along)
    return round(total / stack.placement.topology.num_nodes)


def check_same(
    bench: Bench,
    stack: Stack,
    first: list[torch.Tensor],
    outputs: list[torch.Tensor],
) -> float:
    """How far the logits are from the first variant's, of their norm; not too far."""
    mine = max(
        float((one - other).norm() / other.norm())
        for one, other in zip(outputs, first, strict=True)
    )
    found = max(bench.place.gather(mine))
    limit = EXACT if bench.like.dtype == torch.float32 else SAME
    if not found < limit:
        raise SystemExit(f"{stack.variant.name}: logits differ by {found:.2g}")
    return found


def repeat(bench: Bench, limits: Limits) -> list[list[Turn]]:
    """Variants in turns, each repetition from another one on, a batch each."""
    begun = time.monotonic()
    turns: list[list[Turn]] = [[] for _ in bench.stacks]
    for number in range(limits.repeats):
        over = number > 0 and time.monotonic() - begun > limits.seconds
        if bench.place.told_by_first(over):
            break
        order = np.roll(np.arange(len(turns)), -number)
        for index in order:
            stack = bench.stacks[index]
            stack.install(bench.source)
            batch = number % bench.case.sizes.batches
            mine = [step.milliseconds() for step in bench.steps(stack, batch)]
            prefill, *decode = np.max(bench.place.gather(mine), axis=0).tolist()
            turns[index].append(Turn(prefill=prefill, decode=decode))
    return turns


def take_apart(bench: Bench, limits: Limits) -> list[dict[str, list[Any]]]:
    """Parts of steps: for each variant and phase, one entry a repetition."""
    found: list[dict[str, list[Any]]] = [
        {"prefill": [], "decode": []} for _ in bench.stacks
    ]
    for number in range(limits.parts):
        for stack, own in zip(bench.stacks, found, strict=True):
            stack.install(bench.source)
            marks = Marks(bench.place)
            hooks = marks.attach(stack)
            batch = number % bench.case.sizes.batches
            prompt, *after = [s.parts(marks) for s in bench.steps(stack, batch)]
            for hook in hooks:
                hook.remove()
            own["prefill"].append(slowest(bench.place.gather(prompt)))
            ranks = bench.place.gather(after)
            own["decode"] += [slowest(list(step)) for step in zip(*ranks, strict=True)]
    return found


def slowest(ranks: list[StepParts]) -> dict[str, float]:
    """Milliseconds of a step by parts, layer by layer those of the slowest rank."""
    layers = np.array([step.layers for step in ranks])  # [G, L, 3]
    dispatch, experts, combine = layers.max(axis=0).sum(axis=0).tolist()
    return {
        "other": max(step.other for step in ranks),
        "dispatch": dispatch,
        "experts": experts,
        "combine": combine,
        "mean_experts": float(layers[:, :, 1].mean(axis=0).sum()),
    }
