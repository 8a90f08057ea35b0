"""Several recordings of one model, for a plan that is good for all of them.

Each is split like the first: planned on one part, scored on the other.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from moetuner.errors import InvalidTraceError
from moetuner.evaluation.workload import Workload
from moetuner.planning.baselines import BASELINES
from moetuner.planning.scores import score_placements
from moetuner.trace import CountTrace, Trace, split_by_sequence

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from moetuner.evaluation.evaluate import Evaluation, GainInterval
    from moetuner.placement.model import Placement
    from moetuner.planning.baselines import Rival
    from moetuner.planning.options import PlanOptions
    from moetuner.planning.scores import Scores
    from moetuner.trace.split import Split


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Domain:
    """Scores on the held-out part of one more recording."""

    name: str
    trace_sha256: str
    plan_tokens: int
    score_tokens: int
    evaluations: dict[str, Evaluation]
    """Of each candidate of the plan, by name; contiguous blocks first."""
    gain: GainInterval | None
    """Of the result over contiguous blocks, as `Scores` has it."""
    rival: Rival | None


@dataclass(frozen=True, kw_only=True, slots=True)
class Overall:
    """The mean batch of all recordings, counted as the plan counts them."""

    gain: float
    """Of the result over contiguous blocks; 0.1 is 10 % less."""
    rival: str
    """The best baseline beside the result, or nothing."""
    rival_gain: float
    """Of the result over that one."""


def split_all(
    traces: Sequence[Trace | CountTrace], options: PlanOptions
) -> tuple[Split, ...]:
    """Each recording's planning and held-out part.

    Raises
    ------
    InvalidTraceError
        When one cannot be split, or a part of it routes no token.
    """
    splits = tuple(
        split_by_sequence(trace, options.plan_fraction, options.solver_options.seed)
        for trace in traces
    )
    for number, split in enumerate(splits, start=1):
        for name, part in (("planning", split.plan), ("held-out", split.score)):
            if not num_choices(part):
                which = f" of trace {number}" if len(splits) > 1 else ""
                raise InvalidTraceError(
                    f"plan: no token of the {name} part{which} chose an expert (all "
                    f"padding); record more, or change --split or --seed"
                )
    return splits


def workload_of(splits: Sequence[Split], options: PlanOptions) -> Workload:
    """The batches of all planning parts, counted as the options say."""
    return Workload(
        traces=tuple(split.plan for split in splits),
        cost=options.cost,
        batch_tokens=options.batch_tokens,
        batch_kind=options.batch_kind,
        weights=options.weights,
        worst_case=options.worst_case,
    )


def score_plans(
    split: Split, placements: Mapping[str, Placement], options: PlanOptions
) -> Scores:
    """Scores of all placements on what is held out of one recording."""
    return score_placements(
        split.score,
        placements,
        options.cost,
        result=options.solver,
        seed=options.solver_options.seed,
        batch_tokens=options.batch_tokens,
        batch_kind=options.batch_kind,
    )


def score_domain(
    number: int,
    trace: Trace | CountTrace,
    split: Split,
    placements: Mapping[str, Placement],
    options: PlanOptions,
) -> Domain:
    """Scores of all placements on what is held out of trace `number`."""
    about = trace.metadata.dataset or trace.metadata.source
    scores = score_plans(split, placements, options)
    return Domain(
        name=f"trace {number} ({about})" if about else f"trace {number}",
        trace_sha256=trace.sha256(),
        plan_tokens=num_tokens(split.plan),
        score_tokens=num_tokens(split.score),
        evaluations=scores.evaluations,
        gain=scores.gains[options.solver],
        rival=scores.rival,
    )


def score_overall(
    parts: Sequence[Mapping[str, Evaluation]], options: PlanOptions
) -> Overall:
    """What the plan is for: held-out batches of all recordings together.

    `parts` are scores by name for each recording, contiguous blocks first.
    """
    weights = options.weights or (1.0,) * len(parts)

    def seconds(name: str) -> float:
        means = [part[name].batch_seconds_mean for part in parts]
        if options.worst_case:
            return max(means)
        return float(np.dot(means, weights)) / sum(weights)

    times = {name: seconds(name) for name in parts[0]}
    result = times[options.solver]
    others = [name for name in BASELINES if name in times and name != options.solver]
    rival = min(others, key=times.__getitem__, default="")
    return Overall(
        gain=1 - result / next(iter(times.values())),
        rival=rival,
        rival_gain=1 - result / times[rival] if rival else 0.0,
    )


def num_tokens(trace: Trace | CountTrace) -> int:
    """Tokens of a trace, or of all groups of a count-only source."""
    if isinstance(trace, CountTrace):
        return int(trace.num_tokens.sum())
    return trace.num_tokens


def num_choices(trace: Trace | CountTrace) -> int:
    """(token, layer, expert) choices that are not padding."""
    if isinstance(trace, CountTrace):
        return int(trace.counts.sum())
    return int((trace.topk_ids >= 0).sum())
