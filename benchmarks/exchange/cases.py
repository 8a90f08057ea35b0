"""What is sent: shapes, routing, placements. Real routing is from the held-out part.

Legend: T tokens of a rank, K top-k, E experts, G ranks, P slots, H hidden, I inner.
"""

from __future__ import annotations

import sys
from functools import cache
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from counted import draw_tokens
from moetuner import Placement, Topology, read_placement, read_trace
from moetuner.trace import CountTrace, Trace, split_by_sequence

sys.path.insert(0, str(Path(__file__).parents[1]))
from harness import traces_folder


class Case(NamedTuple):
    """Sizes of a layer; `trace` and `plan` are of real routing."""

    name: str
    num_tokens: int
    top_k: int
    num_experts: int
    hidden: int
    inner: int
    trace: str = ""
    plan: str = ""  # the beginning of its name; planned on the other part of that trace

    def __str__(self):
        return (
            f"{self.name}: {self.num_tokens} x {self.top_k} per rank, "
            f"E={self.num_experts}, H={self.hidden}"
        )


_GPT = ("gpt-oss-20b-fingerprinting/mmlu.npz", "gpt-oss")
_LITE = ("deepseek-v2-lite-esft/law.npz", "deepseek-v2-lite")
CASES = [
    Case("uniform", 4096, 8, 256, 7168, 2048),
    Case("gpt-oss mmlu", 4096, 4, 32, 2880, 2880, *_GPT),
    Case("DeepSeek-V2-Lite law", 4096, 6, 64, 2048, 1408, *_LITE),
    Case("decode", 32, 8, 256, 7168, 2048),
]
GRID = [
    Case("DeepSeek-V2-Lite law", num_tokens, 6, 64, hidden, 1408, *_LITE)
    for hidden in (4096, 7168)
    for num_tokens in (128, 1024, 4096)
]
SEED = 0  # of the split; the same as the plan's
FOLLOW = "tuned for follow"  # the placement of that name


class Routing(NamedTuple):
    """One layer of all ranks' tokens, and the placements that it is run under."""

    tokens: Trace  # [G T, L, K], `home_rank` is where a token begins
    layer: int  # its index in the trace
    placements: dict[str, Placement]

    def ids(self, tokens) -> torch.Tensor:
        """int64 [., K] of the tokens of those numbers."""
        chosen = self.tokens.topk_ids[tokens, self.layer].astype(np.int64)
        return torch.from_numpy(np.ascontiguousarray(chosen)).cuda()

    def here(self, rank: int) -> np.ndarray:
        """Numbers of the tokens that begin at a rank."""
        return np.flatnonzero(self.tokens.home_rank == rank)

    def followed(self, placement: Placement, rank: int) -> np.ndarray:
        """Numbers of those that are there when each went where its first expert is.

        That is the first expert of the layer before, so there must be one.
        """
        slots = placement.slot_experts[self.layer - 1]
        rank_of = np.empty(placement.num_experts, np.int64)
        rank_of[slots] = np.arange(len(slots)) // placement.slots_per_rank
        first = self.tokens.topk_ids[:, self.layer - 1, 0]
        return np.flatnonzero(rank_of[first] == rank)


@cache
def read_held_out(file: str, num_tokens: int) -> Trace:
    """The part of a trace that its plans have not seen; drawn where it only counts."""
    score = split_by_sequence(read_trace(traces_folder() / file), 0.5, SEED).score
    if isinstance(score, CountTrace):
        return draw_tokens(score, num_tokens, SEED)
    return score


def tokens_of_ranks(held_out: Trace, num_ranks: int, num_tokens: int) -> Trace:
    """Consecutive tokens for each rank in turn; a short trace begins again."""
    number = np.arange(num_ranks * num_tokens)
    return Trace(
        topk_ids=held_out.topk_ids[number % held_out.num_tokens],
        num_experts=held_out.num_experts,
        layer_ids=held_out.layer_ids,
        home_rank=(number // num_tokens).astype(np.int16),
        ranked=held_out.ranked,
        metadata=held_out.metadata,
    )


def routings(case: Case, num_ranks: int, plans: Path, num_layers: int) -> list[Routing]:
    """Some layers of a real trace, or one of uniform routing.

    The trace's first layer is left out: no layer before it says where tokens that
    follow their experts are.
    """
    if not case.trace:
        tokens = uniform_tokens(case, num_ranks)
        return [Routing(tokens, 0, {"contiguous": contiguous(tokens, num_ranks)})]
    held_out = read_held_out(case.trace, num_ranks * case.num_tokens)
    tokens = tokens_of_ranks(held_out, num_ranks, case.num_tokens)
    placements = {"contiguous": contiguous(tokens, num_ranks)}
    for name, solver in (("tuned", "joint"), (FOLLOW, "joint-follow")):
        file = plans / f"{case.plan}-{solver}-{num_ranks}.json"
        if name == "tuned" or file.exists():
            placements[name] = read_placement(file)
            assert not placements[name].has_replicas, file
    layers = np.linspace(1, tokens.num_layers - 1, num_layers).astype(int)
    return [Routing(tokens, int(layer), placements) for layer in layers]


def uniform_tokens(case: Case, num_ranks: int) -> Trace:
    """One layer, every expert as likely as any other."""
    chosen = []
    for rank in range(num_ranks):
        rng = torch.Generator().manual_seed(rank)
        noise = torch.rand(case.num_tokens, case.num_experts, generator=rng)
        chosen.append(noise.topk(case.top_k, dim=1).indices)
    ids = torch.cat(chosen).numpy().astype(np.int16)
    home = np.repeat(np.arange(num_ranks, dtype=np.int16), case.num_tokens)
    return Trace(
        topk_ids=ids[:, None],
        num_experts=case.num_experts,
        layer_ids=np.zeros(1, np.int32),
        home_rank=home,
    )


def contiguous(trace: Trace, num_ranks: int) -> Placement:
    """Blocks of experts, rank by rank."""
    slots = np.arange(trace.num_experts, dtype=np.int32)
    return Placement(
        slot_experts=np.tile(slots, (trace.num_layers, 1)),
        layer_ids=trace.layer_ids,
        num_experts=trace.num_experts,
        topology=Topology(num_ranks=num_ranks, ranks_per_node=num_ranks),
    )
