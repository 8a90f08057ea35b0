"""Scores of a placement on a trace: balance, copies, modelled time, and their spread.

Legend: L layers, G ranks, B bootstrap samples, Q sequences.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from moetuner.errors import InvalidTraceError
from moetuner.tally import RoutingTally, tally
from moetuner.trace import CountTrace, Trace
from moetuner.trace.split import sequence_index

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from moetuner.cost import CostModel
    from moetuner.placement import Placement

    Floats = NDArray[np.float64]

MAX_BLOCKS = 512


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class LayerSeconds:
    """Modelled time of each layer, float64 [..., L]; their sum is a layer's time."""

    compute: Floats
    dispatch: Floats
    combine: Floats

    @property
    def total(self) -> Floats:
        """Sum over the parts and the layers, float64 [...]."""
        seconds: Floats = (self.compute + self.dispatch + self.combine).sum(axis=-1)
        return seconds


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Evaluation:
    """What a placement costs on a trace, all tokens as one batch."""

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
    imbalance: Floats
    """[L]"""
    rank_rows: Floats
    """[L, G] (token, expert) pairs computed on each rank."""
    traffic: Floats
    """[G, G] dispatch rows from home to computing rank, all layers."""

    def to_json(self) -> dict[str, Any]:
        """Plain numbers and lists; NaN (unknown to a count-only source) as None."""
        values = dataclasses.asdict(self)
        return {
            name: _plain(value.tolist() if isinstance(value, np.ndarray) else value)
            for name, value in values.items()
        }


@dataclass(frozen=True, kw_only=True, slots=True)
class GainInterval:
    """Relative gain in modelled time, with its bootstrap interval; 0.1 is 10 % less."""

    gain: float
    low: float
    high: float
    confidence: float

    @property
    def certain(self) -> bool:
        """Whether the interval leaves out zero."""
        return self.low > 0 or self.high < 0


def price(rows: RoutingTally, cost: CostModel) -> LayerSeconds:
    """Modelled time of every layer, for each group of the tally."""
    topology = rows.topology
    exchange = {}
    for prefix, value_bytes in (
        ("", cost.shape.dispatch_bytes),
        ("return_", cost.shape.combine_bytes),
    ):
        busiest = {
            kind: np.maximum(
                getattr(rows, f"{prefix}{kind}_egress").max(axis=-1),
                getattr(rows, f"{prefix}{kind}_ingress").max(axis=-1),
            )
            for kind in ("rank", "node")
        }
        exchange[prefix] = cost.exchange_seconds(
            busiest["rank"], busiest["node"], value_bytes, topology
        )
    return LayerSeconds(
        compute=cost.compute_seconds(rows.rank_rows(), rows.active_experts()),
        dispatch=exchange[""],
        combine=exchange["return_"],
    )


def evaluate(
    trace: Trace | CountTrace, placement: Placement, cost: CostModel
) -> Evaluation:
    """Score `placement` on every token of `trace`.

    Raises
    ------
    InvalidTraceError, InvalidPlacementError, MissingStatisticsError
        As `moetuner.tally.tally`; and when the trace has no tokens.
    """
    rows = tally(trace, placement, wire=cost.wire, homes=cost.homes).total()
    return summarise(rows, cost)


def summarise(rows: RoutingTally, cost: CostModel) -> Evaluation:
    """The scores of a tally with one group."""
    num_tokens = float(rows.tokens[0])
    if not num_tokens:
        raise InvalidTraceError("evaluate: the trace has no tokens")
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
        imbalance=imbalance,
        rank_rows=rank_rows,
        traffic=rows.traffic.sum(axis=0),
    )


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
    rows = tally(trace, placement, wire=cost.wire, homes=cost.homes, groups=groups)
    num_groups = rows.tokens.shape[0]
    weights = np.ones((1 + samples, num_groups))
    if num_groups < 2:
        return np.full(1 + samples, np.nan)
    rng = np.random.default_rng(seed)
    draws = rng.multinomial(num_groups, np.full(num_groups, 1 / num_groups), samples)
    weights[1:] = draws
    return price(rows.weighted(weights), cost).total


def gain_interval(
    baseline: Floats, candidate: Floats, confidence: float = 0.95
) -> GainInterval:
    """Gain of `candidate` over `baseline` from their paired bootstrap times."""
    gains = 1 - candidate / baseline
    tail = (1 - confidence) / 2
    low, high = np.quantile(gains[1:], [tail, 1 - tail])
    return GainInterval(
        gain=float(gains[0]), low=float(low), high=float(high), confidence=confidence
    )


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
