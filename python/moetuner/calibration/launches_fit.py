"""From times of whole layers to what they take beside, and at least.

A layer that is launched waits for its host twice: for what comes on top of its parts,
whatever they take, and, where they take less time than their launches, for those. Few
tokens say how long a host takes; they say nothing of layers that keep a GPU busy.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np

from moetuner.calibration.prediction import predict, start_seconds
from moetuner.calibration.samples import Load
from moetuner.evaluation.times_file import LayerPart

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

    from moetuner.calibration.samples import Case, LayerSample
    from moetuner.evaluation.hardware import Hardware

    Floats = NDArray[np.float64]


def with_launches(
    bare: Hardware,
    layers: Sequence[LayerSample],
    ranks_per_node: int,
    seed: int,
    *,
    launched: bool,
) -> Hardware:
    """The machine with `layer_overhead`, and `compute_floor` where a host launches.

    Parameters
    ----------
    bare
        Without either.
    layers
        Whole layers of one form.
    ranks_per_node
        Of the ranks that were measured.
    seed
        That the loads were drawn with.
    launched
        On a GPU, by a host; else nothing waits for launches.
    """
    own = [s for s in layers if is_priced(s.case)]
    if not own:
        return bare
    told = [predict(s.case, bare, ranks_per_node, seed) for s in own]
    took = np.array([s.timing.seconds for s in own])
    experts = np.array([parts[LayerPart.EXPERTS] for parts in told])
    rest = np.array([parts[LayerPart.TOTAL] for parts in told]) - experts
    start = np.array([start_seconds(s.case.shape, bare) for s in own])
    both = took - rest - start  # floor and overhead of layers that wait
    tries = [(0.0, _beside(took, rest + experts))]
    if launched:
        besides = [0.0, *(took - rest - experts).tolist()]
        tries += [
            (least - beside, beside)
            for least in both.tolist()
            for beside in besides
            if 0.0 <= beside < least
        ]
    floor, overhead = min(
        tries,
        key=lambda one: _error(
            took, rest + np.maximum(experts, one[0] + start) + one[1]
        ),
    )
    return replace(bare, layer_overhead=overhead, compute_floor=floor)


def is_priced(case: Case) -> bool:
    """Whether the objective is about whole layers of such a case.

    An exchange that sends nothing starts all the same, but has no latency in the
    objective. It is measured for the rows that it brings into order. With one rank its
    start is part of what a layer takes besides.
    """
    return case.num_ranks == 1 or case.load is not Load.LOCAL


def _beside(took: Floats, told: Floats) -> float:
    """Seconds beside `told` that come nearest, by relative errors; never negative."""
    weights = took**-2.0
    return max(float(weights @ (took - told) / weights.sum()), 0.0)


def _error(took: Floats, told: Floats) -> float:
    """Of all relative errors together; one that is far off counts for less."""
    return float(np.abs(told / took - 1).sum())
