"""A few layers of a problem: what is asked of them in a moment holds for all.

Legend: T tokens, L layers.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np

from moetuner.problem import PlacementProblem
from moetuner.solver.joint.replicas import is_sum_of_layers
from moetuner.trace import CountTrace, Trace

if TYPE_CHECKING:
    from numpy.typing import NDArray


def some_layers(
    problem: PlacementProblem, spread: int, hot: int = 0
) -> PlacementProblem:
    """The same with so many layers, evenly spread, and those with the hottest expert.

    With all of them where they are no more, or the modelled time is no sum of layers.
    """
    if problem.num_layers <= spread + hot or not is_sum_of_layers(problem):
        return problem
    load = problem.statistics.load
    share = load.max(axis=1) / np.maximum(load.sum(axis=1), 1)
    hottest = np.argsort(-share, kind="stable")[:hot]
    even = np.linspace(0, problem.num_layers - 1, spread).round().astype(np.int64)
    chosen = np.union1d(even, hottest)
    traces = tuple(_only(trace, chosen) for trace in problem.workload.traces)
    return PlacementProblem.from_workload(
        replace(problem.workload, traces=traces),
        problem.topology,
        objective=problem.objective,
        slots_per_rank=problem.slots_per_rank,
    )


def _only(trace: Trace | CountTrace, layers: NDArray[np.int64]) -> Trace | CountTrace:
    layer_ids = trace.layer_ids[layers]
    if isinstance(trace, CountTrace):
        counts = trace.counts[:, layers]
        return replace(trace, counts=counts, layer_ids=layer_ids)
    weights = trace.topk_weights
    return replace(
        trace,
        topk_ids=np.ascontiguousarray(trace.topk_ids[:, layers]),
        topk_weights=None if weights is None else weights[:, layers],
        layer_ids=layer_ids,
    )
