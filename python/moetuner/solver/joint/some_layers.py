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

    Where homes follow, as many in a row, with the hottest of all in their middle: each
    needs the one before it. All where they are no more, or where several traces are
    asked for their slowest.
    """
    if problem.num_layers <= spread + hot or problem.workload.takes_slowest:
        return problem
    load = problem.statistics.load
    share = load.max(axis=1) / np.maximum(load.sum(axis=1), 1)
    hottest = np.argsort(-share, kind="stable")[:hot]
    if is_sum_of_layers(problem):
        even = np.linspace(0, problem.num_layers - 1, spread).round().astype(np.int64)
        chosen = np.union1d(even, hottest)
    else:
        middle = int(hottest[0]) if hot else problem.num_layers // 2
        most = problem.num_layers - spread - hot
        first = min(max(middle - (spread + hot) // 2, 0), most)
        chosen = np.arange(first, first + spread + hot)
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
