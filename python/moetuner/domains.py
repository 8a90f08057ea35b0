"""Several recordings of one model, for a plan that is good for all of them.

Each is split like the first: planned on one part, scored on the other.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from moetuner.errors import InvalidTraceError
from moetuner.evaluation import Evaluation, evaluate
from moetuner.trace import CountTrace, Trace, split_by_sequence
from moetuner.workload import Workload

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from moetuner.placement import Placement
    from moetuner.plan_options import PlanOptions
    from moetuner.trace.split import Split


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Domain:
    """Scores on the held-out part of one more recording."""

    name: str
    trace_sha256: str
    plan_tokens: int
    score_tokens: int
    evaluations: dict[str, Evaluation]
    """Of each candidate of the plan, by name."""


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


def score_domain(
    number: int,
    trace: Trace | CountTrace,
    split: Split,
    placements: Mapping[str, Placement],
    options: PlanOptions,
) -> Domain:
    """Scores of all placements on what is held out of trace `number`."""
    about = trace.metadata.dataset or trace.metadata.source
    evaluations = {
        name: evaluate(
            split.score,
            placement,
            options.cost,
            batch_tokens=options.batch_tokens,
            batch_kind=options.batch_kind,
        )
        for name, placement in placements.items()
    }
    return Domain(
        name=f"trace {number} ({about})" if about else f"trace {number}",
        trace_sha256=trace.sha256(),
        plan_tokens=num_tokens(split.plan),
        score_tokens=num_tokens(split.score),
        evaluations=evaluations,
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
