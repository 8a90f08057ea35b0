"""From times of whole layers to what they take beside, and at least.

A layer that is launched waits for its host twice: for what comes on top of its parts,
whatever they take, and, where they take less time than their launches, for those. Few
tokens say how long a host takes; they say nothing of layers that keep a GPU busy.

Parts of a launched layer are timed one by one, each by its slowest rank. Which rank
that is differs, so a layer takes less than its parts together: what its exchange takes
of their time is fitted, too.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np

from moetuner.calibration.prediction import predict, start_seconds
from moetuner.calibration.samples import Load
from moetuner.evaluation.rates import Bandwidth, Latency
from moetuner.evaluation.times_file import LayerPart

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from numpy.typing import NDArray

    from moetuner.calibration.samples import Case, LayerSample
    from moetuner.evaluation.hardware import Hardware

    Floats = NDArray[np.float64]

_SHARES = tuple((np.arange(100, 59, -1) / 100).tolist())
"""Of the time of its parts that an exchange may take."""


def with_launches(
    bare: Hardware,
    layers: Sequence[LayerSample],
    ranks_per_node: int,
    seed: int,
    *,
    launched: bool,
) -> Hardware:
    """The machine with `layer_overhead`, and `compute_floor` where a host launches.

    Its exchange then takes the part of its time that whole layers take.

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
    shares = _SHARES if launched else (1.0,)
    _, share, floor, overhead = min(
        (
            (error, share, floor, overhead)
            for share in shares
            for error, floor, overhead in _tries(
                took, share * rest, experts, start, launched=launched
            )
        ),
        key=lambda one: one[0],
    )
    machine = _faster_exchange(bare, share, own[0].case.num_ranks, ranks_per_node)
    return replace(machine, layer_overhead=overhead, compute_floor=floor)


def _tries(
    took: Floats, rest: Floats, experts: Floats, start: Floats, *, launched: bool
) -> Iterator[tuple[float, float, float]]:
    """Errors with floors and overheads that might be: error, floor, overhead."""
    told = rest + experts
    beside = _beside(took, told)
    yield _error(took, told + beside), 0.0, beside
    if not launched:
        return
    for least in (took - rest - start).tolist():  # floor and overhead of who waits
        for beside in (0.0, *(took - told).tolist()):
            if 0.0 <= beside < least:
                floor = least - beside
                waited = rest + np.maximum(experts, floor + start) + beside
                yield _error(took, waited), floor, beside


def _faster_exchange(
    bare: Hardware, share: float, num_ranks: int, ranks_per_node: int
) -> Hardware:
    """`bare` whose exchange takes that share of its time, on links that are there."""
    found = bare
    if ranks_per_node > 1:
        found = replace(
            found,
            rank_bandwidth=_wider(bare.rank_bandwidth, share),
            rank_latency=_shorter(bare.rank_latency, share),
        )
    if num_ranks > ranks_per_node:
        found = replace(
            found,
            nic_bandwidth=_wider(bare.nic_bandwidth, share),
            node_latency=_shorter(bare.node_latency, share),
        )
    return found


def _wider(of: Bandwidth | float, share: float) -> Bandwidth:
    ways = Bandwidth.of(of, "bandwidth")
    egress, ingress = (
        tuple(value / share for value in way) for way in (ways.egress, ways.ingress)
    )
    return Bandwidth(egress=egress, ingress=ingress)


def _shorter(of: Latency | float, share: float) -> Latency:
    time = Latency.of(of, "latency")
    return Latency(base=share * time.base, per_rank=share * time.per_rank)


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
