"""Placement files side by side, on tokens that none of them was planned on."""

from __future__ import annotations

from typing import TYPE_CHECKING

from moetuner._words import amount
from moetuner.errors import InvalidPlacementError
from moetuner.evaluation.tally import check_same_model
from moetuner.evaluation.workload import DEFAULT_BATCH_TOKENS, BatchKind, Workload
from moetuner.planning.baselines import (
    REFERENCE,
    Baselines,
    SolvedBaselines,
    solve_baselines,
)
from moetuner.planning.options import Pricing
from moetuner.planning.provenance import part_of, slots_of
from moetuner.planning.recordings import Recording
from moetuner.planning.scores import score_placements
from moetuner.problem import PlacementProblem
from moetuner.solver import SolverOptions
from moetuner.trace.phases import of_phase, split_of_phase

if TYPE_CHECKING:
    from collections.abc import Mapping

    from moetuner.evaluation.cost import CostModel
    from moetuner.placement.model import Placement
    from moetuner.planning.scores import Comparison
    from moetuner.trace import CountTrace, Trace
    from moetuner.trace.phases import Phase


def compare_placements(
    trace: Trace | CountTrace,
    placements: Mapping[str, Placement],
    cost: CostModel,
    *,
    before: str | None = None,
    seed: int = 0,
    batch_tokens: int = DEFAULT_BATCH_TOKENS,
    batch_kind: BatchKind = BatchKind.SEQUENCES,
    phase: Phase | None = None,
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
        Machine, model shape, wire and homes; those that a placement was planned with
        are told by `moetuner.planning.provenance.pricing_of`.
    before
        Name of the placement that gains are measured against; contiguous blocks by
        default.
    seed
        Of the random baseline and the bootstrap.
    batch_tokens, batch_kind
        Batches that are scored beside all tokens at once, as `evaluate` takes them.
    phase
        Score tokens of this phase alone; all of them when None.

    Raises
    ------
    InvalidPlacementError
        When placements differ in model or machine, or were planned on different parts
        of the trace; or as `evaluate`.
    """
    result = next(iter(placements))
    _check_alike(trace, placements)
    recording = _held_out(trace, placements, phase)
    baselines = _baselines(recording, placements[result], cost, seed)
    solved = {n: each.placement for n, each in baselines.solutions.items()}
    everything = {**solved, **placements}
    order = dict.fromkeys((before or REFERENCE, *everything))
    return score_placements(
        recording,
        {name: everything[name] for name in order},
        Pricing(
            cost=cost, batch_tokens=batch_tokens, batch_kind=batch_kind, phase=phase
        ),
        result=result,
        seed=seed,
        solutions={
            name: solution
            for name, solution in baselines.solutions.items()
            if name not in placements
        },
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
                f"{name}: for {amount(other.topology.num_ranks, 'rank')}, "
                f"{other.topology.ranks_per_node} per node, but {first} is for "
                f"{one.topology.num_ranks}, {one.topology.ranks_per_node} per node; "
                f"compare placements for the same machine"
            )


def _held_out(
    trace: Trace | CountTrace,
    placements: Mapping[str, Placement],
    phase: Phase | None,
) -> Recording:
    """The trace, split as it was for the placements where they were planned on it."""
    sha256 = trace.sha256()
    found: dict[tuple[float, int], str] = {}
    for name, placement in placements.items():
        try:
            part = part_of(placement, sha256)
        except InvalidPlacementError as error:
            raise InvalidPlacementError(f"{name}: {error}") from error
        if part is not None:
            found[part] = name
    if len(found) > 1:
        raise InvalidPlacementError(
            f"{' and '.join(found.values())} were planned on different parts of this "
            f"trace: plan them with the same `plan_fraction` and `seed`"
        )
    about = trace.metadata.dataset or trace.metadata.source
    for part in found:
        split = split_of_phase(trace, *part, phase)
        return Recording(
            name=about,
            sha256=sha256,
            plan=split.plan,
            score=split.score,
            in_sample=not split.held_out,
        )
    scored = of_phase(trace, phase)
    return Recording(name=about, sha256=sha256, plan=None, score=scored)


def _baselines(
    recording: Recording, placement: Placement, cost: CostModel, seed: int
) -> SolvedBaselines:
    """Baselines with the slots of `placement`, where it was given those to fill."""
    part = recording.score if recording.plan is None else recording.plan
    problem = PlacementProblem.from_workload(
        Workload(traces=(part,), cost=cost),
        placement.topology,
        slots_per_rank=slots_of(placement),
    )
    options = SolverOptions(seed=seed)
    if recording.plan is None:
        return solve_baselines(problem, Baselines.UNPLANNED, options)
    solver = placement.provenance.solver
    skip = "" if solver == REFERENCE else solver
    return solve_baselines(problem, Baselines.QUICK, options, skip=skip)
