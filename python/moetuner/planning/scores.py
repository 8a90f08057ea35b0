"""Placements on the same tokens: the one result of plans and of files."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING

from moetuner.evaluation.evaluate import draw_batches, evaluate, paired_gain
from moetuner.planning.baselines import PLANNED_ON_NOTHING, best_rival
from moetuner.trace.statistics import RoutingStatistics

if TYPE_CHECKING:
    from collections.abc import Mapping

    from moetuner.evaluation.cost import CostModel
    from moetuner.evaluation.evaluate import Draws, Evaluation, GainInterval
    from moetuner.evaluation.workload import BatchKind
    from moetuner.placement.model import Placement
    from moetuner.placement.topology import Topology
    from moetuner.planning.baselines import Rival
    from moetuner.planning.options import Pricing
    from moetuner.planning.recordings import Overall, Recording
    from moetuner.solver import Solution
    from moetuner.trace import CountTrace, Trace
    from moetuner.trace.model import TraceMetadata


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Scored:
    """One placement with its score, and how it came about where that is known."""

    name: str
    placement: Placement
    evaluation: Evaluation
    gain: GainInterval | None
    """Gain in the mean batch over the baseline; None for the baseline itself, or when
    the tokens are of a single sequence."""
    solution: Solution | None = None
    """What its solver claims; None of a placement that was read from a file."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Comparison:
    """Placements of one model on one machine, scored on the same tokens."""

    name: str
    """Of the recording that is scored."""
    candidates: tuple[Scored, ...]
    """The first is the baseline of every gain."""
    result: Scored
    cost: CostModel
    batch_kind: BatchKind
    """How tokens of a batch belong together."""
    scored: Trace | CountTrace
    """The tokens that are scored."""
    trace_sha256: str
    """Of the whole recording."""
    plan_tokens: int
    """Tokens of this recording that the result was planned on; 0 when it was planned
    on another, or nobody knows."""
    in_sample: bool = False
    """Whether the result was planned on the very tokens that are scored."""
    rival: Rival | None = None
    """The best baseline beside the result."""
    left_out: Mapping[str, str] = field(default_factory=dict)
    """Baselines that could not be planned, and why."""
    others: tuple[Comparison, ...] = ()
    """The same placements on every other recording that the plan is for."""
    refit: Solution | None = None
    """The plan of all tokens that the same options make; what is scored is the plan of
    one part. None when nobody asked for it or it was not made."""
    overall: Overall | None = None
    """All recordings together, where there are several."""

    @property
    def baseline(self) -> Scored:
        """What the result is compared with."""
        return self.candidates[0]

    @property
    def topology(self) -> Topology:
        """Ranks and nodes of all placements."""
        return self.result.placement.topology

    @property
    def metadata(self) -> TraceMetadata:
        """Model and source of the recording."""
        return self.scored.metadata

    @property
    def held_out(self) -> bool:
        """Whether the result is known not to have been planned on the scored tokens."""
        if self.in_sample:
            return False
        origin = self.result.placement.provenance
        of_another = origin.trace_sha256 not in ("", self.trace_sha256)
        return self.plan_tokens > 0 or of_another or origin.solver in PLANNED_ON_NOTHING

    @property
    def score_tokens(self) -> int:
        """Tokens that are scored."""
        return self.result.evaluation.num_tokens

    @cached_property
    def statistics(self) -> RoutingStatistics:
        """Of the tokens that are scored; counted when first asked for."""
        return RoutingStatistics.from_trace(self.scored)


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Measured:
    """What a placement does on tokens, and how it varies."""

    evaluation: Evaluation
    draws: Draws


def measure(
    recording: Recording, placement: Placement, pricing: Pricing, seed: int
) -> Measured:
    """Score a placement on what `recording` holds out; `seed` is of the bootstrap."""
    trace, cost, kind = recording.score, pricing.cost, pricing.batch_kind
    evaluation = evaluate(
        *(trace, placement, cost), batch_tokens=pricing.batch_tokens, batch_kind=kind
    )
    draws = draw_batches(*(trace, placement, cost, evaluation, kind), seed=seed)
    return Measured(evaluation=evaluation, draws=draws)


def score_placements(
    recording: Recording,
    placements: Mapping[str, Placement],
    pricing: Pricing,
    *,
    result: str,
    seed: int,
    solutions: Mapping[str, Solution] | None = None,
    left_out: Mapping[str, str] | None = None,
    measured: Mapping[str, Measured] | None = None,
) -> Comparison:
    """Score `placements` on what `recording` holds out, with paired intervals.

    Parameters
    ----------
    placements
        By name; gains are measured against the first.
    result
        Which of them the comparison is about.
    seed
        Of the bootstrap.
    solutions
        Of those that were solved for, by name.
    left_out
        Baselines that could not be planned, and why.
    measured
        Those that `measure` was told of already, with this seed.

    Raises
    ------
    InvalidTraceError, InvalidPlacementError, InvalidProblemError
        As `moetuner.evaluation.evaluate`.
    """
    known = measured or {}
    scores = {
        name: known.get(name) or measure(recording, placement, pricing, seed)
        for name, placement in placements.items()
    }
    draws = {name: score.draws for name, score in scores.items()}
    reference = next(iter(placements))
    scored = {
        name: Scored(
            name=name,
            placement=placement,
            evaluation=scores[name].evaluation,
            gain=None
            if name == reference
            else paired_gain(draws[reference], draws[name]),
            solution=(solutions or {}).get(name),
        )
        for name, placement in placements.items()
    }
    return Comparison(
        name=recording.name,
        candidates=tuple(scored.values()),
        result=scored[result],
        cost=pricing.cost,
        batch_kind=pricing.batch_kind,
        scored=recording.score,
        trace_sha256=recording.sha256,
        plan_tokens=recording.plan_tokens,
        in_sample=recording.in_sample,
        rival=best_rival(result, draws, reference),
        left_out=left_out or {},
    )
