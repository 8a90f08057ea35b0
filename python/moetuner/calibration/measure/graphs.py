"""Calls as one CUDA graph, where that can be."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from collections.abc import Sequence

    from moetuner.calibration.measure.clock import Step
    from moetuner.calibration.measure.ranks import Ranks


def captured(ranks: Ranks, steps: Sequence[Step]) -> Step | None:
    """A step that replays them all; None, on every rank, where any cannot.

    A rank that takes no part has no steps, and replays nothing.

    Rows that Gloo carries go through the host, and the exact form waits for it. No
    graph holds those.
    """
    if not ranks.on_cuda:
        return None
    _run(steps)  # maps memory, loads kernels
    torch.cuda.synchronize()
    graph: torch.cuda.CUDAGraph | None = None
    kept, trouble = None, 0.0
    if steps:
        graph = torch.cuda.CUDAGraph()
        try:
            with torch.cuda.graph(graph):
                kept = _run(steps)
        except RuntimeError:  # what follows is measured launched, and says so
            torch.cuda.synchronize()
            trouble = 1.0
    if ranks.largest([trouble])[0]:
        return None

    def replay(_: Any, kept: Any = kept) -> Any:
        if graph is not None:
            graph.replay()
        return kept

    return replay


def _run(steps: Sequence[Step]) -> Any:
    value: Any = None
    for step in steps:
        value = step(value)
    return value
