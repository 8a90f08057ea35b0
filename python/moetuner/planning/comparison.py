"""Placements side by side, on tokens that none of them was planned on.

The result of `moetuner.planning.plan.plan_trace`, or placement files from anywhere.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from moetuner._checks import is_number, is_whole
from moetuner.errors import InvalidPlacementError
from moetuner.evaluation.tally import check_same_model
from moetuner.evaluation.workload import DEFAULT_BATCH_TOKENS, BatchKind, Workload
from moetuner.planning.baselines import (
    PLANNED_ON_NOTHING,
    REFERENCE,
    Baselines,
    SolvedBaselines,
    solve_baselines,
)
from moetuner.planning.recordings import num_tokens
from moetuner.planning.scores import score_placements
from moetuner.problem import PlacementProblem
from moetuner.solver import SolverOptions
from moetuner.trace import CountTrace, Trace, split_by_sequence
from moetuner.trace.statistics import RoutingStatistics

if TYPE_CHECKING:
    from collections.abc import Mapping

    from moetuner.evaluation.cost import CostModel
    from moetuner.evaluation.evaluate import Evaluation, GainInterval
    from moetuner.placement.model import Placement
    from moetuner.placement.topology import Topology
    from moetuner.planning.baselines import Rival
    from moetuner.planning.plan import PlanReport
    from moetuner.planning.recordings import Domain, Overall
    from moetuner.planning.request_homes import ScoredHomes
    from moetuner.trace.model import TraceMetadata
    from moetuner.trace.split import Split


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Scored:
    """One placement with its score."""

    name: str
    placement: Placement
    evaluation: Evaluation
    gain: GainInterval | None
    """Gain in modelled time over the baseline; None for the baseline itself, or when
    the tokens are of a single sequence."""


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Comparison:
    """Placements of one model on one machine, scored on the same tokens."""

    candidates: tuple[Scored, ...]
    """The first is the baseline of every gain."""
    result: Scored
    cost: CostModel
    statistics: RoutingStatistics
    """Of the tokens that are scored."""
    metadata: TraceMetadata
    trace_sha256: str
    plan_tokens: int
    """Tokens of this trace that the result was planned on; 0 when it was planned on
    another, or nobody knows."""
    rival: Rival | None = None
    """The best baseline beside the result."""
    left_out: Mapping[str, str] = field(default_factory=dict)
    """Baselines that could not be planned, and why."""
    domains: tuple[Domain, ...] = ()
    overall: Overall | None = None
    request_homes: ScoredHomes | None = None
    """Of a plan for several recordings, or with a second stage, as
    `moetuner.planning.plan.PlanReport` has them."""

    @property
    def baseline(self) -> Scored:
        """What the result is compared with."""
        return self.candidates[0]

    @property
    def topology(self) -> Topology:
        """Ranks and nodes of all placements."""
        return self.result.placement.topology

    @property
    def held_out(self) -> bool:
        """Whether the result is known not to have been planned on the scored tokens."""
        origin = self.result.placement.provenance
        of_another = origin.trace_sha256 not in ("", self.trace_sha256)
        return self.plan_tokens > 0 or of_another or origin.solver in PLANNED_ON_NOTHING

    @property
    def score_tokens(self) -> int:
        """Tokens that are scored."""
        return self.result.evaluation.num_tokens


def comparison_of_plan(trace: Trace | CountTrace, report: PlanReport) -> Comparison:
    """What `plan_trace` found about `trace`, beside the statistics it is scored on."""
    options = report.options
    split = split_by_sequence(trace, options.plan_fraction, options.solver_options.seed)
    scored = {
        candidate.name: Scored(
            name=candidate.name,
            placement=candidate.placement,
            evaluation=candidate.evaluation,
            gain=candidate.gain,
        )
        for candidate in report.candidates
    }
    return Comparison(
        candidates=tuple(scored.values()),
        result=scored[report.result.name],
        cost=options.cost,
        statistics=RoutingStatistics.from_trace(split.score),
        metadata=trace.metadata,
        trace_sha256=trace.sha256(),
        plan_tokens=report.plan_tokens,
        rival=report.rival,
        left_out=report.left_out,
        domains=report.domains,
        overall=report.overall,
        request_homes=report.request_homes,
    )


def compare_placements(
    trace: Trace | CountTrace,
    placements: Mapping[str, Placement],
    cost: CostModel,
    *,
    before: str | None = None,
    seed: int = 0,
    batch_tokens: int = DEFAULT_BATCH_TOKENS,
    batch_kind: BatchKind = BatchKind.SEQUENCES,
) -> Comparison:
    """Score placements and baselines on what none of them was planned on.

    A placement that says it was planned on this very trace is scored on the part
    that it did not see, and the baselines are planned on the part that it did. Of
    another trace, or of unknown origin, every token is scored, and only the baselines
    that need no planning stand beside it.

    Parameters
    ----------
    trace
        Tokens to score.
    placements
        By name; the first is the result.
    cost
        Machine, model shape, wire and homes.
    before
        Name of the placement that gains are measured against; contiguous blocks by
        default.
    seed
        Of the random baseline and the bootstrap.
    batch_tokens, batch_kind
        Batches that are scored beside all tokens at once, as `evaluate` takes them.

    Raises
    ------
    InvalidPlacementError
        When placements differ in model or machine, or were planned on different parts
        of the trace; or as `evaluate`.
    """
    sha256 = trace.sha256()
    result = next(iter(placements))
    _check_alike(trace, placements)
    split = _find_split(trace, sha256, placements)
    score = trace if split is None else split.score
    baselines = _baselines(score, split, placements[result], cost, seed)
    planned = {n: each.placement for n, each in baselines.solutions.items()}
    everything = {**planned, **placements}
    order = dict.fromkeys((before or REFERENCE, *everything))
    scores = score_placements(
        score,
        {name: everything[name] for name in order},
        cost,
        result=result,
        seed=seed,
        batch_tokens=batch_tokens,
        batch_kind=batch_kind,
    )
    scored = {
        name: Scored(
            name=name,
            placement=everything[name],
            evaluation=evaluation,
            gain=scores.gains[name],
        )
        for name, evaluation in scores.evaluations.items()
    }
    return Comparison(
        candidates=tuple(scored.values()),
        result=scored[result],
        cost=cost,
        statistics=RoutingStatistics.from_trace(score),
        metadata=trace.metadata,
        trace_sha256=sha256,
        plan_tokens=0 if split is None else num_tokens(split.plan),
        rival=scores.rival,
        left_out=baselines.left_out,
    )


def _check_alike(
    trace: Trace | CountTrace, placements: Mapping[str, Placement]
) -> None:
    for name, placement in placements.items():
        try:
            check_same_model(trace, placement)
        except InvalidPlacementError as error:
            raise InvalidPlacementError(f"{name}: {error}") from error
    (first, one), *others = placements.items()
    for name, other in others:
        if other.topology != one.topology:
            raise InvalidPlacementError(
                f"{name}: for {other.topology.num_ranks} ranks, "
                f"{other.topology.ranks_per_node} per node, but {first} is for "
                f"{one.topology.num_ranks}, {one.topology.ranks_per_node} per node; "
                f"compare placements for the same machine"
            )


def _find_split(
    trace: Trace | CountTrace, sha256: str, placements: Mapping[str, Placement]
) -> Split | None:
    """The split that the placements were planned with, if it was of this trace."""
    found: dict[tuple[float, int], str] = {}
    for name, placement in placements.items():
        origin = placement.provenance
        others = origin.options.get("other_traces")
        if sha256 != origin.trace_sha256 and not (
            isinstance(others, list) and sha256 in others
        ):
            continue
        fraction, seed = origin.options.get("plan_fraction"), origin.options.get("seed")
        if (
            fraction is None
            or seed is None
            or not (is_number(fraction) and is_whole(seed))
        ):
            raise InvalidPlacementError(
                f"{name}: planned on this trace, but its provenance does not say on "
                f"which part (plan_fraction, seed): nothing is known to be held out"
            )
        found[float(fraction), int(seed)] = name
    if len(found) > 1:
        raise InvalidPlacementError(
            f"{' and '.join(found.values())} were planned on different parts of this "
            f"trace: plan them with the same --split and --seed"
        )
    return next((split_by_sequence(trace, *key) for key in found), None)


def _baselines(
    score: Trace | CountTrace,
    split: Split | None,
    placement: Placement,
    cost: CostModel,
    seed: int,
) -> SolvedBaselines:
    """Baselines with the slots of `placement`, where it was given those to fill."""
    origin = placement.provenance
    given = origin.options.get("equal_slots") is True or placement.has_replicas
    part = score if split is None else split.plan
    problem = PlacementProblem.from_workload(
        Workload(traces=(part,), cost=cost),
        placement.topology,
        slots_per_rank=placement.slots_per_rank if given else 0,
    )
    options = SolverOptions(seed=seed)
    if split is not None:
        skip = "" if origin.solver == REFERENCE else origin.solver
        return solve_baselines(problem, Baselines.QUICK, options, skip=skip)
    return solve_baselines(problem, Baselines.UNPLANNED, options)
