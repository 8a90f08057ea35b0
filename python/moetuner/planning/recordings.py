"""Recordings of one model, each hashed once and split once.

One part is planned on, the other is scored.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from moetuner.errors import InvalidTraceError
from moetuner.evaluation.workload import Workload
from moetuner.planning.baselines import BASELINES
from moetuner.trace import CountTrace, Trace
from moetuner.trace.phases import split_of_phase

if TYPE_CHECKING:
    from collections.abc import Sequence

    from moetuner.planning.options import PlanOptions
    from moetuner.planning.scores import Comparison
    from moetuner.trace.phases import Phase


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Recording:
    """One trace in two parts."""

    name: str
    sha256: str
    """Of the whole trace."""
    plan: Trace | CountTrace | None
    """The planning part; None when nothing was planned on this trace."""
    score: Trace | CountTrace
    """The held-out part; all of it when nothing was planned on this trace."""
    in_sample: bool = False
    """Whether nothing could be held out: both parts are the whole trace."""

    @property
    def plan_tokens(self) -> int:
        """Tokens of the planning part."""
        return 0 if self.plan is None else num_tokens(self.plan)


@dataclass(frozen=True, kw_only=True, slots=True)
class Overall:
    """The mean batch of all recordings, counted as the plan counts them."""

    gain: float
    """Of the result over what gains are measured against; 0.1 is 10 % less."""
    rival: str
    """The best baseline beside the result, or nothing."""
    rival_gain: float
    """Of the result over that one."""


def split_recordings(
    traces: Sequence[Trace | CountTrace],
    fraction: float,
    seed: int,
    phase: Phase | None = None,
) -> tuple[Recording, ...]:
    """Each trace's planning and held-out part, of one phase if so asked.

    Raises
    ------
    InvalidTraceError
        When a part of one routes no token, or has none of the phase.
    """
    found = []
    for number, trace in enumerate(traces, start=1):
        split = split_of_phase(trace, fraction, seed, phase)
        for part, tokens in (("planning", split.plan), ("held-out", split.score)):
            if not num_choices(tokens):
                which = f" of trace {number}" if len(traces) > 1 else ""
                raise InvalidTraceError(
                    f"plan: no token of the {part} part{which} chose an expert (all "
                    f"padding); record more, or change `plan_fraction` or `seed`"
                )
        about = trace.metadata.dataset or trace.metadata.source
        name = f"trace {number} ({about})" if about else f"trace {number}"
        found.append(
            Recording(
                name=name,
                sha256=trace.sha256(),
                plan=split.plan,
                score=split.score,
                in_sample=not split.held_out,
            )
        )
    return tuple(found)


def workload_of(recordings: Sequence[Recording], options: PlanOptions) -> Workload:
    """The batches of all planning parts, counted as the options say."""
    return Workload(
        traces=tuple(each.plan for each in recordings if each.plan is not None),
        cost=options.cost,
        batch_tokens=options.batch_tokens,
        batch_kind=options.batch_kind,
        weights=options.weights,
        worst_case=options.worst_case,
    )


def score_overall(comparisons: Sequence[Comparison], options: PlanOptions) -> Overall:
    """What the plan is for: held-out batches of all recordings together."""
    weights = options.weights or (1.0,) * len(comparisons)
    means = {
        scored.name: [
            each.candidates[place].evaluation.batch_seconds_mean for each in comparisons
        ]
        for place, scored in enumerate(comparisons[0].candidates)
    }
    times = {
        name: max(own)
        if options.worst_case
        else float(np.dot(own, weights)) / sum(weights)
        for name, own in means.items()
    }
    name, reference = comparisons[0].result.name, comparisons[0].baseline.name
    beside = dict.fromkeys((*BASELINES, reference))
    rivals = [each for each in beside if each in times and each != name]
    rival = min(rivals, key=times.__getitem__, default="")
    return Overall(
        gain=1 - times[name] / next(iter(times.values())),
        rival=rival,
        rival_gain=1 - times[name] / times[rival] if rival else 0.0,
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
