"""Placements beside each other on the same tokens."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from moetuner.evaluation.evaluate import (
    Evaluation,
    GainInterval,
    bootstrap_seconds,
    evaluate,
    paired_gain,
)
from moetuner.planning.baselines import Rival, best_rival

if TYPE_CHECKING:
    from collections.abc import Mapping

    from moetuner.evaluation.cost import CostModel
    from moetuner.evaluation.workload import BatchKind
    from moetuner.placement.model import Placement
    from moetuner.trace import CountTrace, Trace


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Scores:
    """Scores of placements by name; the first is what gains are measured against."""

    evaluations: dict[str, Evaluation]
    gains: dict[str, GainInterval | None]
    """In modelled time over the first; None for that one itself, or when the tokens
    are of a single sequence."""
    rival: Rival | None
    """The best baseline beside the result; None without one, or without intervals."""


def score_placements(
    trace: Trace | CountTrace,
    placements: Mapping[str, Placement],
    cost: CostModel,
    *,
    result: str,
    seed: int,
    batch_tokens: int,
    batch_kind: BatchKind,
) -> Scores:
    """Score `placements` on every token of `trace`, with paired intervals.

    Raises
    ------
    InvalidTraceError, InvalidPlacementError, InvalidProblemError
        As `moetuner.evaluation.evaluate`.
    """
    evaluations = {
        name: evaluate(
            trace, placement, cost, batch_tokens=batch_tokens, batch_kind=batch_kind
        )
        for name, placement in placements.items()
    }
    seconds = {
        name: bootstrap_seconds(trace, placement, cost, seed=seed)
        for name, placement in placements.items()
    }
    reference, *others = seconds
    gains: dict[str, GainInterval | None] = {reference: None}
    for name in others:
        gains[name] = paired_gain(seconds[reference], seconds[name])
    return Scores(
        evaluations=evaluations, gains=gains, rival=best_rival(result, seconds)
    )
