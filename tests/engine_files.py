"""Files that the engines' own code wrote, and the routing that they all carry."""

from pathlib import Path

import numpy as np
from moetuner.planning.plan import demo_trace
from moetuner.trace import Trace

FOLDER = Path(__file__).parent / "fixtures" / "engines"


def reference_trace() -> Trace:
    """48 tokens of the shipped trace, its first three layers as layers 1, 2 and 3."""
    demo = demo_trace()
    return Trace(
        topk_ids=np.ascontiguousarray(demo.topk_ids[:48, :3]),
        num_experts=demo.num_experts,
        layer_ids=np.array([1, 2, 3], np.int32),
    )


def reference_load() -> np.ndarray:
    """int64 [3, 64], assignments of those tokens."""
    ids = reference_trace().topk_ids
    return np.stack([np.bincount(ids[:, n].ravel(), minlength=64) for n in range(3)])
