"""count_routing against what one would write in torch: index_add, one-hot products."""

import pytest

torch = pytest.importorskip("torch", reason="torch is not installed")

import shapes  # noqa: E402
from moetuner.ops import count_routing  # noqa: E402


def ours_load(ids, previous, load, pairs, steps):
    count_routing(ids, load)


def ours_all(ids, previous, load, pairs, steps):
    count_routing(ids, load, pairs, previous, steps)


def torch_load(ids, previous, load, pairs, steps):
    load.index_add_(0, ids.flatten(), torch.ones_like(ids.flatten(), dtype=load.dtype))


def torch_all(ids, previous, load, pairs, steps):
    shape = (len(ids), len(load))
    here = torch.zeros(shape, dtype=torch.float32, device=ids.device)
    here.scatter_(1, ids.long(), 1.0)
    before = torch.zeros(shape, dtype=torch.float32, device=ids.device)
    before.scatter_(1, previous.long(), 1.0)
    load += here.sum(dim=0).long()
    pairs += (here.T @ here).long()
    steps += (before.T @ here).long()


@pytest.mark.parametrize("function", [ours_load, torch_load, ours_all, torch_all])
@pytest.mark.parametrize("shape", shapes.SHAPES, ids=str)
def bench_count_routing(benchmark, shape, function):
    ids = shapes.make_ids(shape, 8)
    size = shape.num_experts
    counters = [
        torch.zeros(sizes, dtype=torch.int64, device=shapes.DEVICE)
        for sizes in ((size,), (size, size), (size, size))
    ]
    calls = [
        lambda here=here, before=before: function(here, before, *counters)
        for here, before in zip(ids, ids[1:] + ids[:1], strict=True)
    ]
    name = function.__name__.replace("_", " ").replace("ours", "moetuner")
    shapes.record(benchmark, shape, f"count_routing: {name}", 0, calls)
