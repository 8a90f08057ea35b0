"""What is sent: shapes, routing, placements. Real routing is from the held-out part.

Legend: T tokens of a rank, K top-k, E experts, G ranks, H hidden, I inner.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from moetuner import read_placement, read_trace
from moetuner.trace import split_by_sequence

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


class Routing(NamedTuple):
    """One layer's ids int64 [T, K] of this rank, and the tuned slots [P] or None."""

    ids: torch.Tensor
    tuned: torch.Tensor | None


def routings(case: Case, rank: int, num_ranks: int, plans: Path) -> list[Routing]:
    """Some layers of a real trace, or one of uniform routing."""
    if not case.trace:
        rng = torch.Generator().manual_seed(rank)
        noise = torch.rand(case.num_tokens, case.num_experts, generator=rng)
        return [Routing(noise.topk(case.top_k, dim=1).indices.cuda(), None)]
    trace = read_trace(traces_folder() / case.trace)
    held_out = split_by_sequence(trace, 0.5, SEED).score
    placement = read_placement(plans / f"{case.plan}-joint-{num_ranks}.json")
    # Consecutive tokens for each rank; a short trace begins again.
    first = rank * case.num_tokens
    mine = held_out.topk_ids[
        np.arange(first, first + case.num_tokens) % held_out.num_tokens
    ]
    layers = np.linspace(0, trace.num_layers - 1, 4).astype(int)
    return [
        Routing(
            torch.from_numpy(mine[:, layer].astype(np.int64)).contiguous().cuda(),
            torch.from_numpy(placement.slot_experts[layer].astype(np.int64)),
        )
        for layer in layers
    ]
