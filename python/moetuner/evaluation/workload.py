"""What a placement is judged by: batches of a trace, and the modelled time of each.

A step waits for the slowest rank of *its* batch, so times are modelled batch by batch
and then averaged; pooling all tokens into one batch hides that experts that are chosen
together are busy together.

Legend: T tokens, Q batches, L layers, D traces.
"""

from __future__ import annotations

import enum
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from moetuner._checks import is_number, is_whole, one_of
from moetuner.errors import InvalidProblemError, InvalidTraceError
from moetuner.evaluation.cost import CostModel
from moetuner.evaluation.tally import RoutingTally, tally
from moetuner.trace import CountTrace, Trace
from moetuner.trace.phases import only_decodes
from moetuner.trace.split import sequence_index

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from moetuner._core import LayerPrice
    from moetuner.placement.model import Placement
    from moetuner.placement.topology import Topology

    Floats = NDArray[np.float64]

DEFAULT_BATCH_TOKENS = 2048
POOLED = 0
"""Batch size that stands for all tokens in one batch."""
_KNOWN = 8
"""Placements whose times a workload remembers."""
MIN_WEIGHT = 1e-12
"""Of a trace, by the largest one's: less is lost in rounding."""


class BatchKind(str, enum.Enum):
    """How the tokens of a batch belong together."""

    SEQUENCES = "sequences"
    """Whole sequences in the order of the trace, as prefill runs them. One that is
    longer than a batch is cut where batches end (chunked prefill)."""
    MIXED = "mixed"
    """Tokens of all sequences, as decode runs them: at most one of each sequence where
    the trace says that all were decoded, else shuffled by a fixed seed."""


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class LayerSeconds:
    """Modelled time of each layer, float64 [..., L], and of its parts."""

    compute: Floats
    dispatch: Floats
    combine: Floats
    layer: Floats

    @property
    def total(self) -> Floats:
        """Sum over the layers, float64 [...]."""
        seconds: Floats = self.layer.sum(axis=-1)
        return seconds


def price(rows: RoutingTally, cost: CostModel) -> LayerSeconds:
    """Modelled time of every layer, for each group of the tally."""
    return _price_by(rows, cost.layer_price(rows.topology))


def _price_by(rows: RoutingTally, layer_price: LayerPrice) -> LayerSeconds:
    exchange = {}
    for prefix, direction in (
        ("", layer_price.rates.dispatch),
        ("return_", layer_price.rates.combine),
    ):
        exchange[prefix] = layer_price.exchange(
            direction,
            layer_price.busiest_rank(
                getattr(rows, f"{prefix}rank_egress"),
                getattr(rows, f"{prefix}rank_ingress"),
            ),
            layer_price.busiest_node(
                getattr(rows, f"{prefix}node_egress"),
                getattr(rows, f"{prefix}node_ingress"),
            ),
        )
    compute = layer_price.compute(rows.rank_rows(), rows.active_experts())
    dispatch, combine = exchange[""], exchange["return_"]
    return LayerSeconds(
        compute=compute,
        dispatch=dispatch,
        combine=combine,
        layer=layer_price.total(compute, dispatch, combine),
    )


def batch_index(
    trace: Trace | CountTrace,
    batch_tokens: int,
    kind: BatchKind = BatchKind.SEQUENCES,
    *,
    chunk_tokens: int | None = None,
) -> NDArray[np.int32]:
    """Batch of each token, int32 [T] with every number from 0 to Q - 1.

    The trace is cut into the whole number of batches that comes nearest to
    ``batch_tokens`` each; a sequence belongs where its middle lies, so batches differ
    by less than the longest sequence. Sequences of more than ``chunk_tokens`` tokens
    (default: those of a batch) are cut where a batch ends. Without ``sequence`` tokens
    stand alone. Of a count-only source groups take the place of sequences, and the
    result is [groups].

    Mixed batches of decoded tokens have at most ``batch_tokens`` of them, at most one
    of a sequence, and sizes that differ by one at most.
    """
    if batch_tokens != POOLED and kind is BatchKind.MIXED and only_decodes(trace):
        steps = _decode_steps(trace, batch_tokens)
        if steps is not None:
            return steps
    sizes, order = _units(
        trace, kind, batch_tokens if chunk_tokens is None else chunk_tokens
    )
    if batch_tokens == POOLED or not sizes.sum():
        return np.zeros(order.size, np.int32)
    total = int(sizes.sum())
    wanted = max(round(total / batch_tokens), 1)
    middle = np.cumsum(sizes) - sizes / 2
    batch_of_unit = np.minimum(middle * wanted // total, wanted - 1)
    of_unit = np.zeros(sizes.size, np.int32)
    _, of_unit[sizes > 0] = np.unique(batch_of_unit[sizes > 0], return_inverse=True)
    return of_unit[order]


def num_batches(batches: NDArray[np.integer[Any]]) -> int:
    """How many batches a `batch_index` tells apart; one where there is no token."""
    return int(batches.max(initial=0)) + 1


def cuts_sequences(trace: Trace | CountTrace, batch_tokens: int) -> bool:
    """Whether a batch of so many tokens is too short for a sequence of the trace."""
    if isinstance(trace, CountTrace) or trace.sequence is None:
        return False
    longest = int(np.bincount(sequence_index(trace)).max(initial=0))
    return batch_tokens != POOLED and longest > batch_tokens


def _decode_steps(
    trace: Trace | CountTrace, batch_tokens: int
) -> NDArray[np.int32] | None:
    """Steps of decoding; None where nobody says which sequence a token is of.

    As with a full queue of requests, each step has tokens from all over the sequences:
    in the order of sequences, every Q-th token is of the same step.
    """
    if isinstance(trace, CountTrace) or trace.sequence is None:
        return None
    index = sequence_index(trace)
    num_steps = max(-(-trace.num_tokens // batch_tokens), int(np.bincount(index).max()))
    steps = np.empty(trace.num_tokens, np.int32)
    steps[np.argsort(index, kind="stable")] = np.arange(trace.num_tokens) % num_steps
    return steps


def _units(
    trace: Trace | CountTrace, kind: BatchKind, chunk_tokens: int
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Tokens of each unit that is never cut, in batch order, and each token's unit."""
    if isinstance(trace, CountTrace):
        return trace.num_tokens, np.arange(trace.num_groups)
    if kind is BatchKind.MIXED:
        order = np.random.default_rng(0).permutation(trace.num_tokens)
        return np.ones(trace.num_tokens, np.int64), order
    if trace.sequence is None:
        return np.ones(trace.num_tokens, np.int64), np.arange(trace.num_tokens)
    index = sequence_index(trace)
    _, first = np.unique(index, return_index=True)
    place = np.empty(first.size, np.int64)
    place[np.argsort(first)] = np.arange(first.size)
    unit = place[index]
    sizes = np.bincount(unit, minlength=first.size)
    long = sizes > (chunk_tokens or trace.num_tokens)
    if long.any():
        unit = _cut(unit, long)
        sizes = np.bincount(unit)
    return sizes, unit


def _cut(unit: NDArray[np.int64], long: NDArray[np.bool_]) -> NDArray[np.int64]:
    """Unit of each token where each token of a long sequence is a unit of its own."""
    order = np.argsort(unit, kind="stable")
    in_order = unit[order]
    begins = np.ones(unit.size, bool)
    begins[1:] = (in_order[1:] != in_order[:-1]) | long[in_order[1:]]
    cut = np.empty(unit.size, np.int64)
    cut[order] = np.cumsum(begins) - 1
    return cut


def tally_batches(
    trace: Trace | CountTrace,
    placement: Placement,
    cost: CostModel,
    batches: NDArray[np.int32],
    *,
    num_threads: int = 0,
) -> RoutingTally:
    """Rows of every batch; ``batches`` is a `batch_index` of the trace."""
    cost.check_topology(placement.topology)
    groups = None if isinstance(trace, CountTrace) else batches
    rows = tally(
        trace,
        placement,
        wire=cost.wire,
        homes=cost.homes,
        replica_rule=cost.replica_rule,
        groups=groups,
        num_threads=num_threads,
    )
    if isinstance(trace, CountTrace):
        rows = rows.weighted(
            (np.arange(num_batches(batches))[:, None] == batches) * 1.0
        )
    return rows


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class _Times:
    """What a workload remembers of a placement on one trace."""

    total: Floats
    """[Q]"""
    layer_mean: Floats
    """Over batches, [L]"""

    @classmethod
    def of(cls, rows: RoutingTally, layer_price: LayerPrice) -> _Times:
        times = _price_by(rows, layer_price)
        total = times.total
        total.setflags(write=False)
        return cls(total=total, layer_mean=times.layer.mean(axis=0))


def _routes_of(placement: Placement) -> tuple[Any, ...]:
    """Equal for placements that send every token the same ways.

    Without replicas empty slots do not matter, nor where on its rank an expert is.
    """
    several = placement.has_replicas
    where = placement.slot_experts if several else placement.rank_of()
    layers = placement.layer_ids.tobytes()
    return placement.topology, placement.num_experts, layers, several, where.tobytes()


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Workload:
    """The batches that a placement shall be fast for, and what they run on.

    Parameters
    ----------
    traces
        One trace, or several of one model (domains) for a robust plan.
    cost
        Machine, model shape, wire and homes.
    batch_tokens
        Tokens of a batch, about; 0 pools each trace into one batch.
    batch_kind
        Whole sequences or mixed tokens.
    weights
        What each trace counts for; they are scaled to sum 1. Equal when empty.
    worst_case
        True: the objective is the largest mean of any trace, weights left out.

    Raises
    ------
    InvalidProblemError
        When an option makes no sense.
    InvalidTraceError
        When there is no trace, or they are of several models.
    """

    traces: tuple[Trace | CountTrace, ...]
    cost: CostModel = field(default_factory=CostModel)
    batch_tokens: int = DEFAULT_BATCH_TOKENS
    batch_kind: BatchKind = BatchKind.SEQUENCES
    weights: tuple[float, ...] = ()
    worst_case: bool = False
    batches: tuple[NDArray[np.int32], ...] = field(init=False)
    """`batch_index` of each trace."""
    _known: dict[tuple[Any, ...], tuple[_Times, ...]] = field(
        init=False, repr=False, default_factory=dict
    )
    _prices: dict[Topology, LayerPrice] = field(
        init=False, repr=False, default_factory=dict
    )

    def __post_init__(self) -> None:
        kind = one_of(BatchKind, self.batch_kind, "Workload: batch_kind")
        object.__setattr__(self, "batch_kind", kind)
        check_batch_tokens("Workload", self.batch_tokens)
        if not self.traces:
            raise InvalidTraceError("Workload: wanted at least one trace, got none")
        first = self.traces[0]
        for trace in self.traces:
            if trace.num_experts != first.num_experts or not np.array_equal(
                trace.layer_ids, first.layer_ids
            ):
                raise InvalidTraceError(
                    f"Workload: traces are of different models: {first.num_experts} "
                    f"experts in layers {first.layer_ids.tolist()}, and "
                    f"{trace.num_experts} in {trace.layer_ids.tolist()}"
                )
        weights = self.weights or (1.0,) * len(self.traces)
        if len(weights) != len(self.traces) or not all(
            is_number(w) and 0 < w < np.inf for w in weights
        ):
            raise InvalidProblemError(
                f"Workload: weights must be {len(self.traces)} positive numbers, one "
                f"per trace, got {self.weights!r}"
            )
        if min(weights) < MIN_WEIGHT * max(weights) or not sum(weights) < np.inf:
            raise InvalidProblemError(
                f"Workload: weights must have a finite sum, and none less than "
                f"{MIN_WEIGHT:g} of the largest, got {self.weights!r}"
            )
        object.__setattr__(self, "weights", tuple(w / sum(weights) for w in weights))
        batches = tuple(
            batch_index(t, self.batch_tokens, self.batch_kind) for t in self.traces
        )
        object.__setattr__(self, "batches", batches)

    @property
    def counted(self) -> bool:
        """Whether a source only counted: nobody knows the experts of each token."""
        return any(isinstance(trace, CountTrace) for trace in self.traces)

    @property
    def takes_slowest(self) -> bool:
        """Whether the objective is the largest of several means: no sum over layers."""
        return self.worst_case and len(self.traces) > 1

    def batch_seconds(
        self, placement: Placement, *, num_threads: int = 0
    ) -> tuple[Floats, ...]:
        """Modelled time of every batch, float64 [Q] for each of the D traces."""
        return tuple(times.total for times in self._times(placement, num_threads))

    def layer_seconds(self, placement: Placement) -> Floats:
        """Mean over batches of each layer's time, traces by their weights, [L]."""
        total = np.zeros(placement.num_layers)
        for times, weight in zip(self._times(placement, 0), self.weights, strict=True):
            total += weight * times.layer_mean
        return total

    def _times(self, placement: Placement, num_threads: int) -> tuple[_Times, ...]:
        """For each trace; of the last placements they are known.

        A tally of a large one takes seconds, and a planner asks for the whole, then for
        the layers of the same, and again when it is done.
        """
        key = _routes_of(placement)
        found = self._known.get(key)
        if found is None:
            found = tuple(
                _Times.of(
                    tally_batches(
                        trace, placement, self.cost, batches, num_threads=num_threads
                    ),
                    self._price_on(placement.topology),
                )
                for trace, batches in zip(self.traces, self.batches, strict=True)
            )
            while len(self._known) >= _KNOWN:
                self._known.pop(next(iter(self._known)))
            self._known[key] = found
        return found

    def _price_on(self, topology: Topology) -> LayerPrice:
        """The layer's price there: made once, for a search asks thousands of times."""
        found = self._prices.get(topology)
        if found is None:
            found = self._prices[topology] = self.cost.layer_price(topology)
        return found

    def seconds(self, placement: Placement, *, num_threads: int = 0) -> float:
        """Mean over batches of their modelled time, over traces as they count."""
        times = self.batch_seconds(placement, num_threads=num_threads)
        means = [float(seconds.mean()) for seconds in times]
        if self.worst_case:
            return max(means)
        return float(np.dot(means, self.weights))


def check_batch_tokens(where: str, batch_tokens: object) -> None:
    """Refuse a batch size that is not a whole number >= 0."""
    if not is_whole(batch_tokens) or batch_tokens < 0:  # type: ignore[operator]
        raise InvalidProblemError(
            f"{where}: batch_tokens must be a whole number >= 0 (0: one batch), got "
            f"{batch_tokens!r}"
        )
