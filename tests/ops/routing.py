"""Routing for the tests of the ops: what routers make, and what they should not."""

from contextlib import contextmanager

import pytest
import torch
from hypothesis import strategies as st

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
IDS = [torch.int32, torch.int64]

# Relative to the largest magnitude: float32 sums in another order; for the 16-bit types
# one rounding of the result, at most half of its last place (2^-8 and 2^-11), beside
# which those sums vanish.
TOLERANCE = {torch.float32: 2e-6, torch.bfloat16: 2**-8, torch.float16: 2**-11}


def same_bits(a, b):
    """Equal to the bit, whatever the type."""
    return torch.equal(
        a.contiguous().view(torch.uint8), b.contiguous().view(torch.uint8)
    )


def make_x(num_tokens, hidden, dtype=torch.float32, seed=0, device="cpu"):
    generator = torch.Generator().manual_seed(seed)
    values = torch.randn(num_tokens, hidden, generator=generator)
    return values.to(dtype).to(device)


@contextmanager
def poisoned_memory():
    """Fresh tensors hold NaN or the largest integer: what is not written shows."""
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


def assert_close(ours, exact, dtype, slack=1.0):
    """`ours` against float64, within the table times `slack`."""
    scale = exact.abs().max().clamp(min=1e-30) if exact.numel() else 1.0
    error = ((ours.double() - exact) / scale).abs()
    assert not error.numel() or float(error.max()) <= slack * TOLERANCE[dtype]


def distinct_ids(generator, num_tokens, top_k, num_experts, skew=0.0):
    """Ids int64 [T, K], distinct in a row; `skew` > 0 makes some experts busy."""
    liking = skew * torch.randn(num_experts, generator=generator)
    noise = torch.rand(num_tokens, num_experts, generator=generator)
    gumbel = -torch.log(-torch.log(noise.clamp(1e-9, 1 - 1e-9)))
    return (gumbel + liking).topk(top_k, dim=1).indices


@st.composite
def routings(draw, max_tokens=40, max_experts=12):
    """(ids [T, K], num_experts): random, skewed, on one expert, empty, with padding."""
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    num_tokens = draw(st.integers(0, max_tokens))
    num_experts = draw(st.integers(1, max_experts))
    top_k = draw(st.integers(1, num_experts))
    kind = draw(st.sampled_from(["random", "skewed", "one", "padded", "repeated"]))
    skew = 3.0 if kind == "skewed" else 0.0
    ids = distinct_ids(generator, num_tokens, top_k, num_experts, skew)
    if kind == "one":
        ids = ids[:, :1] * 0 + draw(st.integers(0, num_experts - 1))
    if kind == "repeated":
        ids = torch.randint(num_experts, ids.shape, generator=generator)
    if kind == "padded":
        hide = torch.rand(ids.shape, generator=generator)
        ids[hide < 0.3] = -1
        ids[hide > 0.9] = num_experts + 3
    return ids.to(draw(st.sampled_from(IDS))), num_experts


@st.composite
def expert_maps(draw, num_ids):
    """(map int32 [ids] or None, experts here)."""
    if draw(st.booleans()):
        return None, num_ids
    here = draw(st.integers(1, num_ids))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    table = torch.full((num_ids,), -1, dtype=torch.int32)
    kept = torch.randperm(num_ids, generator=generator)[:here]
    table[kept] = torch.randperm(here, generator=generator).int()
    return table, here
