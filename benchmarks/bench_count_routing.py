"""count_routing against what one would write in torch: bincount, one-hot products."""

import harness
import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="torch is not installed")

from moetuner.ops import count_routing  # noqa: E402

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
SHAPES = [(16384, 8, 256), (4096, 4, 32), (128, 8, 256)]
ROUTINGS = ["uniform", "skewed"]
NUM_INPUTS = 8


def inputs(num_tokens, top_k, num_experts, routing):
    """Different int32 ids [T, K] of one distribution; distinct experts in a row."""
    rng = np.random.default_rng(0)
    liking = np.zeros(num_experts)
    if routing == "skewed":  # busiest expert about 4 times the mean, as real ones
        liking = rng.normal(0, 0.6, num_experts)
    found = []
    for _ in range(NUM_INPUTS):
        noise = rng.gumbel(size=(num_tokens, num_experts)) + liking
        ids = np.argpartition(-noise, top_k, axis=1)[:, :top_k].astype(np.int32)
        found.append(torch.from_numpy(ids).to(DEVICE))
    return found


def ours_load(ids, previous, load, pairs, steps):
    count_routing(ids, load)


def ours_all(ids, previous, load, pairs, steps):
    count_routing(ids, load, pairs, previous, steps)


def torch_load(ids, previous, load, pairs, steps):
    load.index_add_(0, ids.flatten().long(), torch.ones_like(ids.flatten().long()))


def torch_all(ids, previous, load, pairs, steps):
    shape = (ids.shape[0], load.numel())
    here = torch.zeros(shape, dtype=torch.float32, device=ids.device)
    here.scatter_(1, ids.long(), 1.0)
    before = torch.zeros(shape, dtype=torch.float32, device=ids.device)
    before.scatter_(1, previous.long(), 1.0)
    load += here.sum(dim=0).long()
    pairs += (here.T @ here).long()
    steps += (before.T @ here).long()


@pytest.mark.parametrize("function", [ours_load, torch_load, ours_all, torch_all])
@pytest.mark.parametrize("routing", ROUTINGS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def bench_count_routing(benchmark, shape, routing, function):
    ids = inputs(*shape, routing)
    num_experts = shape[2]
    counters = [
        torch.zeros(size, dtype=torch.int64, device=DEVICE)
        for size in ((num_experts,), (num_experts,) * 2, (num_experts,) * 2)
    ]
    calls = [
        lambda here=here, before=before: function(here, before, *counters)
        for here, before in zip(ids, ids[1:] + ids[:1], strict=True)
    ]
    turn = iter(calls * 100_000)

    def once():
        next(turn)()
        if DEVICE == "cuda":
            torch.cuda.synchronize()

    benchmark.group = f"count_routing {shape} {routing}"
    benchmark.extra_info["device"] = DEVICE
    if DEVICE == "cuda":
        benchmark.extra_info |= harness.gpu_microseconds(calls)
    benchmark.pedantic(once, rounds=50, warmup_rounds=5)
