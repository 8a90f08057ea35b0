"""Shapes, routing and records that the op benchmarks share.

Legend: T tokens, K top-k, E experts, H hidden.
"""

from __future__ import annotations

from typing import NamedTuple

import harness
import numpy as np
import pytest
import torch
from moetuner import demo_trace, read_trace

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


class Shape(NamedTuple):
    """Size of one call, and where its ids come from."""

    num_tokens: int
    top_k: int
    num_experts: int
    hidden: int
    routing: str = "uniform"

    @property
    def permute_bytes(self) -> int:
        """Fewest bytes of a permute or unpermute in bfloat16: rows in, rows out."""
        return 2 * self.hidden * self.num_tokens * (1 + self.top_k)

    def __str__(self) -> str:
        sizes = (
            f"{self.num_tokens} x {self.top_k}, E={self.num_experts}, H={self.hidden}"
        )
        return f"{sizes}, {self.routing}"


_ALL = [
    Shape(16384, 8, 256, 7168),
    Shape(16384, 8, 256, 7168, "skewed"),
    Shape(16384, 2, 8, 4096),
    Shape(4096, 8, 128, 4096),
    Shape(4096, 4, 32, 2880),
    Shape(128, 8, 256, 7168),
    Shape(32, 8, 256, 7168),
    # Real routing: of the trace that ships, and of a public one where it is at hand.
    Shape(16384, 4, 64, 2048, "demo trace"),
    Shape(128, 4, 64, 2048, "demo trace"),
    Shape(4096, 4, 32, 2880, "gpt-oss-20b mmlu"),
]
SMALL_BYTES = 2e8
# On a CPU the small ones will do.
SHAPES = [s for s in _ALL if DEVICE == "cuda" or s.permute_bytes < SMALL_BYTES]


def make_ids(shape: Shape, count: int) -> list[torch.Tensor]:
    """`count` different int32 [T, K] of one distribution; distinct experts in a row.

    Skips the benchmark when the routing is of a trace that is not there.
    """
    if shape.routing == "demo trace":
        return _from_trace(demo_trace(), shape, count)
    if shape.routing == "gpt-oss-20b mmlu":
        file = harness.traces_folder() / "gpt-oss-20b-fingerprinting" / "mmlu.npz"
        if not file.exists():
            pytest.skip(f"no real trace at {file}; set MOETUNER_TRACES")
        return _from_trace(read_trace(file), shape, count)
    generator = torch.Generator(DEVICE).manual_seed(0)
    liking = torch.zeros(shape.num_experts, device=DEVICE)
    if shape.routing == "skewed":  # busiest expert about 4 times the mean, as real ones
        liking = 0.6 * torch.randn(
            shape.num_experts, generator=generator, device=DEVICE
        )
    found = []
    for _ in range(count):
        noise = torch.rand(
            shape.num_tokens, shape.num_experts, generator=generator, device=DEVICE
        )
        scores = liking - torch.log(-torch.log(noise.clamp(1e-9, 1 - 1e-7)))
        found.append(scores.topk(shape.top_k, dim=1).indices.int().contiguous())
    return found


def _from_trace(trace, shape: Shape, count: int) -> list[torch.Tensor]:
    """Consecutive tokens, at another place and layer for each."""
    assert trace.topk_ids.shape[2] == shape.top_k
    assert trace.num_experts == shape.num_experts
    found = []
    for i in range(count):
        ids = np.roll(trace.topk_ids[:, i % trace.num_layers], -1000 * i, axis=0)
        found.append(
            torch.from_numpy(ids[: shape.num_tokens].astype(np.int32)).to(DEVICE)
        )
    return found


def make_x(shape: Shape) -> torch.Tensor:
    """bfloat16 [T, H]."""
    return torch.randn(
        shape.num_tokens, shape.hidden, device=DEVICE, dtype=torch.bfloat16
    )


def record(benchmark, shape, name, bytes_moved, calls):
    """Time `calls` by pytest-benchmark and, on a GPU, by events and by graph replay."""
    turn = iter(calls * 1000)

    def once():
        next(turn)()
        if DEVICE == "cuda":
            torch.cuda.synchronize()

    benchmark.group = f"{shape}"
    benchmark.extra_info |= {"implementation": name, "device": DEVICE}
    if DEVICE == "cuda":
        floor = bytes_moved / harness.copy_bytes_per_second() * 1e6
        benchmark.extra_info |= harness.gpu_microseconds(calls)
        benchmark.extra_info["floor_us"] = round(floor, 2)
    benchmark.pedantic(once, rounds=5, warmup_rounds=1)


def inputs(shape):
    """Pairs (x, ids), as many as the cache does not hold."""
    count = harness.rotations(shape.permute_bytes)
    return [(make_x(shape), ids) for ids in make_ids(shape, count)]
