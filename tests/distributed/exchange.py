"""A model layer's worth of routing over ranks, and what must come of it.

Legend: T tokens of a rank, K top-k, E experts, G ranks, S slots per rank, P = G * S.
"""

from typing import NamedTuple

import numpy as np
import torch
import torch.distributed as dist
from moetuner.ops import combine, dispatch


class Case(NamedTuple):
    """Sizes, tokens of rank r are ``tokens[r % len(tokens)]``."""

    num_experts: int
    top_k: int
    tokens: tuple
    spare_slots: int = 0
    padding: float = 0.0
    hidden: int = 24
    ranks_per_node: int = 0

    def num_tokens(self, rank):
        return self.tokens[rank % len(self.tokens)]


CASES = [
    Case(8, 2, (5, 0, 7, 3)),
    Case(16, 8, (33, 9, 1, 0), spare_slots=2),
    Case(12, 5, (40, 2), spare_slots=1, padding=0.3, ranks_per_node=1),
    Case(8, 3, (0,)),
    Case(8, 1, (17, 4)),
    Case(8, 4, (6,), padding=1.0),
    Case(64, 6, (300, 257), hidden=128, padding=0.05, spare_slots=1),
]


class Slots(NamedTuple):
    """A made-up placement as one rank sees it."""

    slot_experts: np.ndarray  # [P], -1: empty
    slots_per_rank: int
    candidates: torch.Tensor  # int32 [E, R]
    num_candidates: torch.Tensor  # int32 [E]
    scales: torch.Tensor  # float64 [S + 1], of this rank's experts, then NaN


def make_slots(case, rank, num_ranks, device="cpu"):
    """Experts shuffled over the slots; spare ones hold replicas or stay empty."""
    rng = np.random.default_rng(case.num_experts)
    size = -(-case.num_experts // num_ranks) + case.spare_slots
    slots = np.full(num_ranks * size, -1)
    slots[rng.permutation(len(slots))[: case.num_experts]] = rng.permutation(
        case.num_experts
    )
    for p in np.flatnonzero(slots < 0):
        expert = int(rng.integers(case.num_experts))
        mine = slots[p // size * size :][:size]
        if case.spare_slots and expert not in mine and rng.random() < 0.7:
            slots[p] = expert
    found = []
    for expert in range(case.num_experts):
        every = np.flatnonzero(slots == expert).tolist()
        found.append([p for p in every if p // size == rank] or every)
    most = max(map(len, found))
    table = [slots_of + [-1] * (most - len(slots_of)) for slots_of in found]
    return Slots(
        slots,
        size,
        torch.tensor(table, dtype=torch.int32, device=device),
        torch.tensor([len(f) for f in found], dtype=torch.int32, device=device),
        torch.tensor([*scale_of(slots[rank * size :][:size]), np.nan], device=device),
    )


def make_tokens(case, rank, device="cpu", dtype=torch.float32):
    """x [T, H], ids int64 [T, K], weights float32 [T, K]."""
    rng = torch.Generator().manual_seed(1000 * case.num_experts + rank)
    num_tokens = case.num_tokens(rank)
    x = torch.randn(num_tokens, case.hidden, generator=rng).to(dtype)
    noise = torch.rand(num_tokens, case.num_experts, generator=rng)
    ids = noise.topk(case.top_k, dim=1).indices
    hide = torch.rand(ids.shape, generator=rng) < case.padding
    ids[hide] = torch.where(torch.rand(ids.shape, generator=rng) < 0.5, -1, 99)[hide]
    weights = torch.rand(ids.shape, generator=rng)
    return [tensor.to(device) for tensor in (x, ids, weights)]


def scale_of(expert):
    """An expert multiplies its rows by this."""
    return 0.25 * (expert + 1)


def without_ranks(case, x, ids, weights):
    """The layer on one rank, in float64, by autograd."""
    here = (ids >= 0) & (ids < case.num_experts)
    factor = torch.where(here, weights.double() * scale_of(ids.double()), 0.0)
    return x.double() * factor.sum(dim=1, keepdim=True)


def fixed_sizes(case, num_ranks):
    """Room for any routing."""
    most = max(case.tokens)
    return {"capacity": most + 1, "max_rows": num_ranks * most * case.top_k + 1}


def run_experts(slots, sent):
    """Rows times their expert's scale; those behind the last expert's are NaN."""
    row = torch.arange(len(sent.rows), device=sent.rows.device, dtype=torch.int32)
    slot = torch.searchsorted(sent.end_offsets, row, right=True)
    return sent.rows * slots.scales[slot][:, None].to(sent.rows.dtype)


def dispatch_rows(slots, x, ids, weights, **options):
    """Dispatch in the group of all ranks."""
    return dispatch(
        x,
        ids,
        weights,
        slots.candidates,
        slots.num_candidates,
        slots.slots_per_rank,
        dist.group.WORLD.group_name,
        **options,
    )


def run_layer(slots, x, ids, weights, **options):
    """Dispatch, experts, combine; returns the sums and what was dispatched."""
    sent = dispatch_rows(slots, x, ids, weights, **options)
    return combine(run_experts(slots, sent), sent.handle), sent
