"""Our exchange and the experts between its halves, under known loads.

Legend: T tokens of a rank, K top-k, G ranks, S slots of a rank, M rows of its experts.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist

from moetuner.calibration.loads import KnownLoad, known_load, loads_of
from moetuner.calibration.measure.graphs import captured
from moetuner.calibration.measure.memory import need_memory
from moetuner.calibration.samples import (
    Case,
    ExchangeSample,
    Form,
    LayerSample,
    LayerShape,
    Load,
    Timing,
    Way,
)
from moetuner.nn.experts import Experts
from moetuner.ops import (
    Dispatched,
    buffer_nbytes,
    check_overflow,
    combine,
    dispatch,
    node_groups,
)
from moetuner.placement.tables import PlacementTables
from moetuner.placement.topology import Topology

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from moetuner.calibration.budget import Allowance
    from moetuner.calibration.measure.clock import Clock, Step
    from moetuner.calibration.measure.ranks import Ranks
    from moetuner.ops import NodeGroups

    Sample = ExchangeSample | LayerSample

DTYPE = torch.bfloat16
FIXED_LOADS = (Load.LOCAL, Load.NEXT, Load.NEXT_NODE, Load.UNIFORM)


def cases_of(
    shapes: Sequence[LayerShape], tokens: Sequence[int], topology: Topology
) -> list[Case]:
    """What is measured, few tokens first.

    The smallest batch is measured among fewer ranks too: how a latency grows with them.
    """
    found = [
        Case(
            shape=shape,
            form=form,
            load=load,
            num_tokens=num_tokens,
            num_ranks=topology.num_ranks,
        )
        for num_tokens in tokens
        for shape in shapes
        for load in loads_of(topology)
        for form in Form
        if form is Form.EXACT or load in FIXED_LOADS
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
        _need_memory(ranks, case, known)
        if everywhere and case.shape not in experts:
            size = known.placement.slots_per_rank
            experts[case.shape] = make_experts(case.shape, size, ranks.device)
        layer = None
        if ranks.rank < case.num_ranks:
            own = experts[case.shape] if everywhere else None
            layer = _Layer(case, known, own, ranks, *groups.of(case.num_ranks))
        seconds = 0.0
        for sample in _measure(case, layer, ranks, clock, allowance.case_seconds):
            seconds = max(sample.timing.seconds, seconds)
            yield sample
        if layer is not None:
            layer.check()
        allowance.took(series, case.num_tokens, seconds)


def _measure(
    case: Case, layer: _Layer | None, ranks: Ranks, clock: Clock, seconds: float
) -> Iterator[Sample]:
    """One case: replayed where a graph can hold it, else called."""

    def sample(way: Way, timing: Timing, replayed: bool = False) -> ExchangeSample:
        return ExchangeSample(case=case, way=way, replayed=replayed, timing=timing)

    both: list[Step] = [_nothing if layer is None else layer.both]
    if case.num_ranks < ranks.topology.num_ranks:  # how it grows with ranks
        replay = captured(ranks, both) if case.form is Form.FIXED else None
        (timing,) = clock.time(both if replay is None else [replay], seconds)[:1]
        yield sample(Way.BOTH, timing, replay is not None)
        return
    assert layer is not None
    steps: list[Step] = [layer.dispatch, layer.experts, layer.combine]
    if case.form is Form.FIXED:
        alone, whole = (captured(ranks, calls) for calls in (both, steps))
        if alone is not None and whole is not None:
            yield sample(Way.BOTH, clock.time([alone], seconds / 2)[0], True)
            (timing,) = clock.time([whole], seconds / 2)[:1]
            yield LayerSample(case=case, replayed=True, timing=timing)
            return
    out, _, back, total = clock.time(steps, seconds)
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

    def of(self, num_ranks: int) -> tuple[str, NodeGroups | None]:
        """Its name, and the groups of two levels where rows take them."""
        topology = self.ranks.topology
        if num_ranks < topology.num_ranks:
            return self._made[num_ranks], None
        name = self.ranks.group_name
        if 1 < topology.ranks_per_node < topology.num_ranks:
            return name, node_groups(name, topology.ranks_per_node)
        return name, None


class _Layer:
    """One layer on this rank, and the tokens that it is given."""

    def __init__(
        self,
        case: Case,
        known: KnownLoad,
        experts: Experts | None,
        ranks: Ranks,
        group_name: str,
        nodes: NodeGroups | None,
    ) -> None:
        rng = torch.Generator().manual_seed(ranks.rank)
        ids = torch.from_numpy(known.ids(ranks.rank))
        x = torch.randn(len(ids), case.shape.hidden_size, generator=rng)
        tables = PlacementTables.of(known.placement, ranks.rank)
        x, weights = x.to(DTYPE), torch.rand(ids.shape, generator=rng)
        slots = tables.candidates[0], tables.num_candidates[0]
        self._tokens = tuple(t.to(ranks.device) for t in (x, ids, weights))
        self._slots = tuple(torch.from_numpy(t).to(ranks.device) for t in slots)
        self._size, self._group_name = tables.slots_per_rank, group_name
        self._options: dict[str, Any] = {"nodes": nodes}
        if nodes is None:
            self._options["ranks_per_node"] = tables.ranks_per_node
        if case.form is Form.FIXED:
            self._options |= fixed_sizes(case, known)
        self._experts = experts

    def dispatch(self, _: Any) -> Dispatched:
        """The way out."""
        x, ids, weights = self._tokens
        candidates, num_candidates = self._slots
        return dispatch(
            x,
            ids,
            weights,
            candidates,
            num_candidates,
            self._size,
            self._group_name,
            **self._options,
        )

    def experts(self, sent: Dispatched) -> tuple[torch.Tensor, Dispatched]:
        """What they make of the rows."""
        assert self._experts is not None
        return self._experts(sent.rows, sent.end_offsets), sent

    def combine(self, done: tuple[torch.Tensor, Dispatched]) -> torch.Tensor:
        """The way back."""
        return combine(done[0], done[1].handle)

    def both(self, _: Any) -> torch.Tensor:
        """The way out and back, without experts."""
        sent = self.dispatch(None)
        return combine(sent.rows, sent.handle)

    def check(self) -> None:
        """Sizes that are too small would make it look fast."""
        handle = self.dispatch(None).handle
        if handle.overflow is not None:
            check_overflow(handle.overflow)


def fixed_sizes(case: Case, known: KnownLoad) -> dict[str, int]:
    """Just enough room for a load."""
    rows = int(known.counts().rank_rows().max())
    return {"capacity": case.num_tokens, "max_rows": max(rows, 1)}


def make_experts(shape: LayerShape, num_slots: int, device: torch.device) -> Experts:
    """Those of a rank, of random numbers; never trained."""
    made = Experts(
        num_slots, shape.hidden_size, shape.inner_size, device=device, dtype=DTYPE
    )
    return made.requires_grad_(False)


def _need_memory(ranks: Ranks, case: Case, known: KnownLoad) -> None:
    """For weights, for what the exchange makes and for what experts do."""
    shape, rows = case.shape, float(known.counts().rank_rows().max())
    value = DTYPE.itemsize
    slots = known.placement.slots_per_rank
    weights = 3 * slots * shape.hidden_size * shape.inner_size * value
    made = buffer_nbytes(
        case.num_tokens, shape.top_k, shape.hidden_size, case.num_ranks, DTYPE
    )
    inner = rows * (3 * shape.inner_size + 2 * shape.hidden_size) * value
    need_memory(ranks, weights + 2 * made + inner, f"a layer ({case})")
