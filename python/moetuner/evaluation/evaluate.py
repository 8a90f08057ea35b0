"""Scores of a placement on a trace: balance, remote ranks, modelled time, spread.

Legend: L layers, G ranks, B bootstrap samples, Q batches.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from moetuner.errors import InvalidTraceError
from moetuner.evaluation.jackknife import jackknife_seconds
from moetuner.evaluation.tally import RoutingTally, tally
from moetuner.evaluation.workload import (
    DEFAULT_BATCH_TOKENS,
    POOLED,
    BatchKind,
    batch_index,
    check_batch_tokens,
    cuts_sequences,
    price,
    tally_batches,
)
from moetuner.trace import CountTrace, Trace
from moetuner.trace.phases import only_decodes
from moetuner.trace.split import sequence_index

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from moetuner.evaluation.cost import CostModel
    from moetuner.placement.model import Placement

    Floats = NDArray[np.float64]

MAX_BLOCKS = 512
MIN_BATCHES = 10
"""Fewer say little of how batches vary: two would make every interval useless."""


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Evaluation:
    """What a placement costs on a trace: all tokens as one batch, and batch by batch.

    Figures without ``batch_`` in their name pool all tokens.
    """

    num_tokens: int
    imbalance_mean: float
    """Mean over layers of (largest rank load / mean rank load)."""
    imbalance_worst: float
    """The same at the worst layer."""
    remote_ranks_per_token: float
    """Ranks other than the home that compute a token, mean over tokens and layers."""
    remote_nodes_per_token: float
    bottleneck_receive: float
    """Rows that the busiest rank receives, over its even share of the tokens; mean
    over layers."""
    modelled_seconds: float
    compute_seconds: float
    dispatch_seconds: float
    combine_seconds: float
    batch_tokens: int
    """Tokens that were asked for in a batch; 0 is one batch."""
    batch_seconds_mean: float
    """Modelled time of a batch, mean over the batches."""
    batch_seconds_p95: float
    batch_seconds_p99: float
    batch_compute_seconds: float
    """Of a batch, mean over the batches; layers added up. So are the next two."""
    batch_dispatch_seconds: float
    batch_combine_seconds: float
    batch_seconds: Floats
    """[Q], every batch"""
    imbalance: Floats
    """[L]"""
    rank_rows: Floats
    """[L, G] (token, expert) pairs computed on each rank."""
    traffic: Floats
    """[G, G] dispatch rows from home to computing rank, all layers."""

    @property
    def num_ranks(self) -> int:
        """Ranks G that share the tokens."""
        return int(self.rank_rows.shape[1])

    @property
    def tokens_per_second_per_rank(self) -> float:
        """What compares machines of different sizes; NaN where no time is modelled."""
        rank_seconds = float(self.batch_seconds.sum()) * self.num_ranks
        return self.num_tokens / rank_seconds if rank_seconds else np.nan

    def to_json(self) -> dict[str, Any]:
        """Plain numbers and lists; NaN (unknown to a count-only source) as None."""
        values = {
            **{f.name: getattr(self, f.name) for f in dataclasses.fields(self)},
            "num_ranks": self.num_ranks,
            "tokens_per_second_per_rank": self.tokens_per_second_per_rank,
        }
        return {
            name: _plain(value.tolist() if isinstance(value, np.ndarray) else value)
            for name, value in values.items()
        }


@dataclass(frozen=True, kw_only=True, slots=True)
class GainInterval:
    """Relative gain in the mean batch's modelled time; 0.1 is 10 % less.

    The bootstrap interval contains the estimate.
    """

    gain: float
    low: float
    high: float
    confidence: float

    @property
    def certain(self) -> bool:
        """Whether the interval leaves out zero."""
        return self.low > 0 or self.high < 0


def evaluate(
    trace: Trace | CountTrace,
    placement: Placement,
    cost: CostModel,
    *,
    batch_tokens: int = DEFAULT_BATCH_TOKENS,
    batch_kind: BatchKind = BatchKind.SEQUENCES,
) -> Evaluation:
    """Score `placement` on every token of `trace`.

    Batches are those of `moetuner.evaluation.workload.Workload`, so that
    ``batch_seconds_mean`` is the objective ``modelled-time`` of a problem on the
    same trace.

    Raises
    ------
    InvalidTraceError, InvalidPlacementError, MissingStatisticsError
        As `moetuner.evaluation.tally.tally`; and when the trace has no tokens.
    InvalidProblemError
        When ``batch_tokens`` is not a whole number >= 0.
    """
    check_batch_tokens("evaluate", batch_tokens)
    batches = batch_index(trace, batch_tokens, batch_kind)
    return summarise(
        tally_batches(trace, placement, cost, batches), cost, batch_tokens=batch_tokens
    )


def summarise(
    batches: RoutingTally, cost: CostModel, *, batch_tokens: int = POOLED
) -> Evaluation:
    """The scores of a tally whose groups are batches."""
    rows = batches.total()
    num_tokens = float(rows.tokens[0])
    if not num_tokens:
        raise InvalidTraceError("evaluate: the trace has no tokens")
    by_batch = price(batches, cost)
    batch_seconds = by_batch.total
    p95, p99 = np.percentile(batch_seconds, (95, 99))
    rank_rows = rows.rank_rows()[0]
    mean = rank_rows.mean(axis=1)
    imbalance = np.where(
        mean > 0, rank_rows.max(axis=1) / np.where(mean > 0, mean, 1), 1
    )
    num_ranks = rows.topology.num_ranks
    received = rows.traffic.sum(axis=1) - np.diagonal(rows.traffic, axis1=1, axis2=2)
    seconds = price(rows, cost)
    return Evaluation(
        num_tokens=int(num_tokens),
        imbalance_mean=float(imbalance.mean()),
        imbalance_worst=float(imbalance.max()),
        remote_ranks_per_token=float(rows.remote_ranks.mean() / num_tokens),
        remote_nodes_per_token=float(rows.remote_nodes.mean() / num_tokens),
        bottleneck_receive=float(received.max(axis=1).mean() * num_ranks / num_tokens),
        modelled_seconds=float(seconds.total[0]),
        compute_seconds=float(seconds.compute.sum()),
        dispatch_seconds=float(seconds.dispatch.sum()),
        combine_seconds=float(seconds.combine.sum()),
        batch_tokens=batch_tokens,
        batch_seconds_mean=float(batch_seconds.mean()),
        batch_seconds_p95=float(p95),
        batch_seconds_p99=float(p99),
        batch_compute_seconds=_per_batch(by_batch.compute),
        batch_dispatch_seconds=_per_batch(by_batch.dispatch),
        batch_combine_seconds=_per_batch(by_batch.combine),
        batch_seconds=batch_seconds,
        imbalance=imbalance,
        rank_rows=rank_rows,
        traffic=rows.traffic.sum(axis=0),
    )


def _per_batch(seconds: Floats) -> float:
    """Mean over batches of [Q, L] seconds, layers added up."""
    return float(seconds.sum(axis=1).mean())


def bootstrap_seconds(
    trace: Trace | CountTrace,
    placement: Placement,
    cost: CostModel,
    *,
    samples: int = 200,
    seed: int = 0,
) -> Floats:
    """Modelled time of resampled traces, float64 [1 + samples]; the first is real.

    Whole sequences are drawn with replacement (blocks of sequences where there are
    more than 512). The same seed draws the same sequences for every placement, so
    differences between placements are paired. NaN without at least two sequences.
    """
    groups = _blocks(trace)
    rows = tally(
        trace,
        placement,
        wire=cost.wire,
        homes=cost.homes,
        replica_rule=cost.replica_rule,
        groups=groups,
    )
    num_groups = rows.tokens.shape[0]
    weights = np.ones((1 + samples, num_groups))
    if num_groups < 2:
        return np.full(1 + samples, np.nan)
    rng = np.random.default_rng(seed)
    draws = rng.multinomial(num_groups, np.full(num_groups, 1 / num_groups), samples)
    weights[1:] = draws
    return price(rows.weighted(weights), cost).total


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Draws:
    """Mean batches of a placement on the real tokens, and on tokens drawn anew."""

    seconds: Floats
    """[1 + samples], modelled time of the mean batch; the first is real."""
    units: int
    """Batches or sequences that were drawn from."""


def draw_batches(
    trace: Trace | CountTrace,
    placement: Placement,
    cost: CostModel,
    evaluation: Evaluation,
    kind: BatchKind = BatchKind.SEQUENCES,
    *,
    samples: int = 1000,
    seed: int = 0,
) -> Draws:
    """The mean batch of ``evaluation``, and how it varies from draw to draw.

    Batches of whole sequences are drawn with replacement. Of steps of decoding and of
    chunks, which share sequences, groups of sequences are left out in turn, see
    `moetuner.evaluation.jackknife`. Where batches are fewer than `MIN_BATCHES`, or each
    mixes all sequences, sequences are drawn instead, see `bootstrap_seconds`, and their
    spread is put around the mean batch. The same seed draws the same for every
    placement. NaN without at least two sequences.
    """
    times = evaluation.batch_seconds
    num_groups = _num_units(trace)
    if num_groups < 2:
        return Draws(seconds=np.full(1 + samples, np.nan), units=num_groups)
    few = times.size < MIN_BATCHES
    if not few and _share_sequences(trace, kind, evaluation.batch_tokens):
        assert isinstance(trace, Trace)
        off = jackknife_seconds(
            *(trace, placement, cost),
            batch_tokens=evaluation.batch_tokens,
            kind=kind,
            seed=seed,
        )
        mean = evaluation.batch_seconds_mean
        return Draws(seconds=np.concatenate([[mean], mean + off]), units=off.size)
    if few or kind is BatchKind.MIXED:
        pooled = bootstrap_seconds(trace, placement, cost, seed=seed)
        known = pooled[1:][pooled[1:] > 0]
        centre = float(np.median(known)) if known.size else np.nan
        drawn = pooled[1:] * (evaluation.batch_seconds_mean / centre)
        seconds = np.concatenate([[evaluation.batch_seconds_mean], drawn])
        return Draws(seconds=seconds, units=min(num_groups, MAX_BLOCKS))
    rng = np.random.default_rng(seed)
    weights = rng.multinomial(times.size, np.full(times.size, 1 / times.size), samples)
    drawn = weights @ times / times.size
    seconds = np.concatenate([[evaluation.batch_seconds_mean], drawn])
    return Draws(seconds=seconds, units=times.size)


def paired_gain(
    baseline: Draws, candidate: Draws, confidence: float = 0.95
) -> GainInterval | None:
    """Gain of `candidate` over `baseline`, with the interval of their paired draws.

    Student's t with the bootstrap standard error, both for as many units as were drawn
    from: percentiles of the draws would be too narrow for few units (Hesterberg, "What
    Teachers Should Know About the Bootstrap", The American Statistician 69, 2015).
    Draws in which no token was routed tell nothing; None when too few are left.
    """
    from scipy.special import stdtrit  # not with the package: it takes a while

    before, after = baseline.seconds, candidate.seconds
    known = np.isfinite(before) & (before > 0)
    if not known[0] or known.sum() < 2:
        return None
    gains = 1 - after[known] / before[known]
    gain, units = float(gains[0]), baseline.units
    error = float(gains[1:].std()) * np.sqrt(units / (units - 1))
    half = float(stdtrit(units - 1, (1 + confidence) / 2)) * error
    return GainInterval(
        gain=gain, low=gain - half, high=gain + half, confidence=confidence
    )


def _share_sequences(
    trace: Trace | CountTrace, kind: BatchKind, batch_tokens: int
) -> bool:
    """Whether batches are steps of decoding, or chunks."""
    if kind is BatchKind.MIXED:
        return only_decodes(trace)
    return cuts_sequences(trace, batch_tokens)


def _num_units(trace: Trace | CountTrace) -> int:
    """Sequences of a trace, or groups of a count-only source; 0 when unknown."""
    if isinstance(trace, CountTrace):
        return trace.num_groups
    return 0 if trace.sequence is None else trace.num_sequences


def _blocks(trace: Trace | CountTrace) -> NDArray[np.int32] | None:
    if isinstance(trace, CountTrace):
        return None
    if trace.sequence is None:
        return np.zeros(trace.num_tokens, np.int32)
    return (sequence_index(trace) % MAX_BLOCKS).astype(np.int32)


def _plain(value: Any) -> Any:
    if isinstance(value, list):
        return [_plain(item) for item in value]
    if isinstance(value, float) and not np.isfinite(value):
        return None
    return value
