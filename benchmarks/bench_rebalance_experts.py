"""The drop-in for EPLB at the size of DeepSeek-V3: 58 x 256 experts, 288 slots.

With ``EPLB_SOURCE`` naming the published ``eplb.py``, that is timed beside it on the
same loads. ``load`` is the mean over layers of the fullest rank over the mean one.
"""

import importlib.util
import os

import numpy as np
import pytest
from moetuner.integrations.eplb import rebalance_experts

SLOTS, RANKS = 288, 32
LOAD = np.random.default_rng(1).zipf(1.4, (58, 256)).clip(max=10**5).astype(np.float32)


def published():
    """The published function, taking arrays."""
    source = os.environ.get("EPLB_SOURCE")
    if not source:
        pytest.skip("EPLB_SOURCE names no eplb.py of github.com/deepseek-ai/EPLB")
    torch = pytest.importorskip("torch")
    spec = importlib.util.spec_from_file_location("published_eplb", source)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return lambda load, *sizes: module.rebalance_experts(torch.tensor(load), *sizes)


@pytest.mark.parametrize(("groups", "nodes"), [(8, 4), (1, 1)], ids=["nodes", "flat"])
@pytest.mark.parametrize("whose", ["ours", "published"])
def bench_rebalance_experts(benchmark, whose, groups, nodes):
    function = rebalance_experts if whose == "ours" else published()
    slots = benchmark(function, LOAD, SLOTS, groups, nodes, RANKS)[0]
    count = [np.bincount(row, minlength=256) for row in np.asarray(slots)]
    each = np.take_along_axis(LOAD / count, np.asarray(slots), axis=1)
    ranks = each.reshape(58, RANKS, -1).sum(axis=2)
    load = (ranks.max(axis=1) / ranks.mean(axis=1)).mean()
    benchmark.extra_info["load"] = round(float(load), 4)
