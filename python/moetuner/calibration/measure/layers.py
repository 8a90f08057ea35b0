"""Our exchange and the experts between its halves, under known loads.

Legend: T tokens of a rank, K top-k, G ranks, S slots of a rank, M rows of its experts.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch.distributed as dist

from moetuner.calibration.loads import KnownLoad, known_load, loads_of
from moetuner.calibration.measure.graphs import captured
from moetuner.calibration.measure.memory import has_memory
from moetuner.calibration.measure.timed_layer import Path, TimedLayer, make_experts
from moetuner.calibration.samples import (
    PADDED_LOADS,
    Case,
    ExchangeSample,
    Form,
    LayerSample,
    LayerShape,
    Load,
    Timing,
    Way,
)
from moetuner.ops import node_groups
from moetuner.placement.topology import Topology

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from moetuner.calibration.budget import Allowance
    from moetuner.calibration.measure.clock import Clock, Step
    from moetuner.calibration.measure.ranks import Ranks
    from moetuner.nn.experts import Experts

    Sample = ExchangeSample | LayerSample

_IN_A_ROW = 3
"""Layers of a repetition: a model runs one behind the other, and ranks wait for each
other in each. The time of the first alone would hold their start too."""
FIXED_LOADS = (Load.LOCAL, Load.NEXT, Load.NEXT_NODE, Load.UNIFORM)


def cases_of(
    shapes: Sequence[LayerShape],
    tokens: Sequence[int],
    topology: Topology,
    *,
    mapped: bool,
) -> list[Case]:
    """What is measured, few tokens first.

    Uniform loads come in every size, all others in every second one. The smallest batch
    is measured among fewer ranks too: how a latency grows with them. ``mapped``: memory
    of ranks may be, so that the fixed form sends no whole shares inside a node.
    """
    whole = topology.num_ranks > 1 and (topology.num_nodes > 1 or not mapped)
    fixed_loads = PADDED_LOADS if whole else FIXED_LOADS
    found = [
        Case(
            shape=shape,
            form=form,
            load=load,
            num_tokens=num_tokens,
            num_ranks=topology.num_ranks,
        )
        for number, num_tokens in enumerate(tokens)
        for shape in shapes
        for load in loads_of(topology)
        if number % 2 == 0 or load is Load.UNIFORM or topology.num_ranks == 1
        for form in Form
        if form is Form.EXACT or load in fixed_loads
    ]
    fewer, size = [], 2
    while topology.num_nodes == 1 and size < topology.num_ranks:
        fewer.append(size)
        size *= 2
    few = [c for c in found if c.load is Load.UNIFORM and c.num_tokens == tokens[0]]
    return [
        *(
            replace(c, num_ranks=n)
            for n in fewer
            for c in few
            if n <= c.shape.num_experts
        ),
        *found,
    ]


def measure_layers(
    ranks: Ranks,
    clock: Clock,
    allowance: Allowance,
    cases: Sequence[Case],
    seed: int,
) -> Iterator[Sample]:
    """Dispatch, experts and combine of every case, and their sum."""
    groups = _Groups(ranks)
    experts: dict[LayerShape, Experts] = {}
    for case in cases:
        series = f"{case.form.value}, {case.load.value}, {case.shape}, {case.num_ranks}"
        if not allowance.has_room(series, case.num_tokens):
            continue
        known = known_load(case, groups.topology(case.num_ranks), seed)
        everywhere = case.num_ranks == ranks.topology.num_ranks
        wanted, what = _bytes_of(case, known), f"a layer ({case})"
        if not has_memory(ranks, allowance, series, case.num_tokens, wanted, what):
            continue
        if everywhere and case.shape not in experts:
            size = known.placement.slots_per_rank
            experts[case.shape] = make_experts(case.shape, size, ranks.device)
        layer = None
        if ranks.rank < case.num_ranks:
            own = experts[case.shape] if everywhere else None
            layer = TimedLayer(
                known,
                case.form,
                case.shape,
                own,
                ranks,
                groups.path(case.num_ranks),
            )
        seconds = 0.0
        for sample in _measure(case, layer, ranks, clock, allowance.case_seconds):
            seconds = max(sample.timing.seconds, seconds)
            yield sample
        if layer is not None:
            layer.check()
        allowance.took(series, case.num_tokens, _IN_A_ROW * seconds)


def _measure(
    case: Case, layer: TimedLayer | None, ranks: Ranks, clock: Clock, seconds: float
) -> Iterator[Sample]:
    """One case: replayed where a graph can hold it, else called."""

    def sample(way: Way, timing: Timing, replayed: bool = False) -> ExchangeSample:
        return ExchangeSample(case=case, way=way, replayed=replayed, timing=timing)

    both: list[Step] = [_nothing if layer is None else layer.both]
    if case.num_ranks < ranks.topology.num_ranks:  # how it grows with ranks
        own = both if layer is not None else []
        replay = captured(ranks, own * _IN_A_ROW) if case.form is Form.FIXED else None
        if replay is None:
            timing = clock.time(both, seconds, _IN_A_ROW)[0]
        else:
            timing = clock.time([replay], seconds)[0].each_of(_IN_A_ROW)
        yield sample(Way.BOTH, timing, replay is not None)
        return
    assert layer is not None
    steps: list[Step] = [layer.dispatch, layer.experts, layer.combine]
    if case.form is Form.FIXED:
        alone, whole = (captured(ranks, own * _IN_A_ROW) for own in (both, steps))
        if alone is not None and whole is not None:
            timing = clock.time([alone], seconds / 2)[0].each_of(_IN_A_ROW)
            yield sample(Way.BOTH, timing, True)
            timing = clock.time([whole], seconds / 2)[0].each_of(_IN_A_ROW)
            yield LayerSample(case=case, replayed=True, timing=timing)
            return
    out, _, back, total = clock.time(steps, seconds, _IN_A_ROW)
    yield sample(Way.DISPATCH, out)
    yield sample(Way.COMBINE, back)
    yield LayerSample(case=case, replayed=False, timing=total)


def _nothing(_: Any) -> None:
    """What ranks do that take no part."""


class _Groups:
    """Groups of the first ranks, made when they are needed, by all ranks."""

    def __init__(self, ranks: Ranks) -> None:
        self.ranks = ranks
        self._made: dict[int, str] = {}

    def topology(self, num_ranks: int) -> Topology:
        """Of so many ranks; fewer than all are on one node."""
        if num_ranks == self.ranks.topology.num_ranks:
            return self.ranks.topology
        if num_ranks not in self._made:
            group = dist.new_group(list(range(num_ranks)))
            inside = self.ranks.rank < num_ranks
            self._made[num_ranks] = str(group.group_name) if inside else ""
        return Topology(num_ranks=num_ranks, ranks_per_node=num_ranks)

    def path(self, num_ranks: int) -> Path:
        """How rows travel among the first so many ranks."""
        if num_ranks < self.ranks.topology.num_ranks:
            return Path(group_name=self._made[num_ranks], nodes=None)
        return path_of(self.ranks)


def path_of(ranks: Ranks) -> Path:
    """Two levels on several nodes of several ranks; every rank calls this."""
    topology, name, nodes = ranks.topology, ranks.group_name, None
    if 1 < topology.ranks_per_node < topology.num_ranks:
        nodes = node_groups(name, topology.ranks_per_node)
    return Path(group_name=name, nodes=nodes)


def _bytes_of(case: Case, known: KnownLoad) -> float:
    """Of weights, of the exchange, and of what experts make, on the busiest rank."""
    shape, counts = case.shape, known.counts
    rows = float(counts.rank_rows().max())
    come = float(counts.traffic.sum(axis=1).max())
    fixed = case.num_tokens * case.num_ranks if case.form is Form.FIXED else 0
    travel = case.num_tokens * min(shape.top_k, case.num_ranks) + max(come, fixed)
    weights = known.placement.slots_per_rank * shape.expert_bytes
    made = (travel * 2 + rows * 3) * shape.hidden_size + rows * 4 * shape.inner_size
    return weights + 2 * made * shape.values.num_bytes
