"""A trace in numbers: how skewed, how correlated, what is missing."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from moetuner.trace import CountTrace, Trace
from moetuner.trace.hints import hints_of
from moetuner.trace.statistics import RoutingStatistics

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Floats = NDArray[np.float64]


@dataclass(frozen=True, kw_only=True, slots=True)
class Range:
    """Smallest, middle and largest value over the layers."""

    low: float
    median: float
    high: float


@dataclass(frozen=True, kw_only=True, slots=True)
class TraceDescription:
    """What `describe` finds."""

    model: str
    source: str
    dataset: str
    num_tokens: int
    num_sequences: int
    prefill_tokens: int | None
    """Tokens of prompts; None where the recording does not tell phases."""
    decode_tokens: int | None
    """Tokens of answers; None where the recording does not tell phases."""
    layers: tuple[int, ...]
    consecutive_layers: bool
    num_experts: int
    top_k: int | None
    """None where nobody says how many experts a token has."""
    tokens_known: bool
    ranked: bool
    missing: tuple[str, ...]
    unused_experts: int
    """(layer, expert) pairs that no token chose."""
    unused_per_layer: tuple[int, ...]
    """The same for each layer."""
    unused_ids: tuple[tuple[int, ...], ...]
    """Which experts those are, for each layer."""
    load_skew: Range
    """Load of the busiest expert over the mean load."""
    coactivation_lift: Range | None
    """How much more often two experts share a token than independent choices would;
    mean over pairs, weighted by their tokens. 1 means no affinity."""
    transition_lift: Range | None
    """The same for an expert and one of the next recorded layer."""
    hints: tuple[str, ...]
    """What most likely is no routing of the model's traffic."""

    def to_json(self) -> dict[str, Any]:
        """Plain numbers, strings and lists."""
        return dataclasses.asdict(self)


def describe(trace: Trace | CountTrace) -> TraceDescription:
    """Summarise a trace or a count-only source."""
    statistics = RoutingStatistics.from_trace(trace)
    load = statistics.load.astype(np.float64)
    mean = load.mean(axis=1)
    skew = load.max(axis=1) / np.where(mean > 0, mean, 1)
    steps = np.diff(trace.layer_ids)
    unused = statistics.load == 0
    phases = None if isinstance(trace, CountTrace) else trace.phase
    decoded = None if phases is None else int(phases.sum())
    return TraceDescription(
        model=trace.metadata.model,
        source=trace.metadata.source,
        dataset=trace.metadata.dataset,
        num_tokens=statistics.num_tokens,
        num_sequences=(
            trace.num_groups if isinstance(trace, CountTrace) else trace.num_sequences
        ),
        prefill_tokens=None if decoded is None else statistics.num_tokens - decoded,
        decode_tokens=decoded,
        layers=tuple(trace.layer_ids.tolist()),
        consecutive_layers=bool((steps == 1).all()),
        num_experts=trace.num_experts,
        top_k=trace.top_k,
        tokens_known=isinstance(trace, Trace) or trace.tokens_known,
        ranked=isinstance(trace, Trace) and trace.ranked,
        missing=statistics.missing,
        unused_experts=int(unused.sum()),
        unused_per_layer=tuple(unused.sum(axis=1).tolist()),
        unused_ids=tuple(tuple(np.flatnonzero(layer).tolist()) for layer in unused),
        load_skew=_range(skew),
        coactivation_lift=_coactivation_lift(statistics),
        transition_lift=_transition_lift(statistics),
        hints=hints_of(trace),
    )


def _coactivation_lift(statistics: RoutingStatistics) -> Range | None:
    if statistics.coactivation is None or not statistics.num_tokens:
        return None
    lifts = []
    for pairs, load in zip(statistics.coactivation, statistics.load, strict=True):
        counts = pairs.astype(np.float64)
        np.fill_diagonal(counts, 0.0)
        # Independent choices of distinct experts: pairs in proportion to both loads.
        expected = np.outer(load, load).astype(np.float64)
        np.fill_diagonal(expected, 0.0)
        lifts.append(_lift(counts, expected))
    return _range(np.array(lifts))


def _transition_lift(statistics: RoutingStatistics) -> Range | None:
    if statistics.transitions is None or not statistics.transitions.size:
        return None
    load = statistics.load.astype(np.float64)
    lifts = [
        _lift(step.astype(np.float64), np.outer(here, there))
        for step, here, there in zip(
            statistics.transitions, load[:-1], load[1:], strict=True
        )
    ]
    return _range(np.array(lifts))


def _lift(counts: Floats, expected: Floats) -> float:
    """Mean of counts / expected over pairs, weighted by counts; 1 when equal."""
    total, expected_total = counts.sum(), expected.sum()
    if not total or not expected_total:
        return 1.0
    ratio = np.divide(
        counts / total,
        expected / expected_total,
        out=np.zeros_like(counts),
        where=expected > 0,
    )
    return float((ratio * counts).sum() / total)


def _range(values: Floats) -> Range:
    return Range(
        low=float(values.min()),
        median=float(np.median(values)),
        high=float(values.max()),
    )
