"""How much a search smooths: chosen on planning data that it did not see.

A search that fits its batches too closely loses in load on others what it gains in
copies. Each candidate plans briefly on one half of the sequences and is scored on the
other, both ways round; the part that the plan is scored on later is never looked at.
"""

from __future__ import annotations

import enum
import math
from dataclasses import replace
from typing import TYPE_CHECKING

from moetuner.problem import PlacementProblem
from moetuner.solver.base import place
from moetuner.solver.heuristics.lpt import balanced_rank_of
from moetuner.solver.joint.layers import LayerRounds
from moetuner.solver.joint.scenarios import POOLED, SearchProfile
from moetuner.solver.joint.some_layers import some_layers
from moetuner.trace import split_by_sequence

if TYPE_CHECKING:
    from collections.abc import Iterator

    from moetuner.evaluation.workload import Workload
    from moetuner.solver.base import Clock, SolverOptions
    from moetuner.solver.joint.interruptible import Interruptible

TRIAL_PROPOSALS = 2_000
"""Proposals per layer of a trial."""
MIN_TRIAL_LAYERS = 8
"""What fewer layers say of a profile all might not say."""
OVERRUN = 1.5
"""Of the time, what trials may need that were thought to fit in it."""


class Favour(str, enum.Enum):
    """What decides where the modelled time leaves a choice."""

    TIME = "time"
    """The mean time of batches that were not planned on."""
    FEW_RANKS = "few-ranks"
    """Few ranks per token at even loads, for links slower than the model's; see
    `few_ranks_profile`."""
    TRACE = "trace"
    """The time of the trace's own batches and next to nothing beside it: for proofs.
    Other batches take longer than with `TIME`."""


FEW_RANKS_PROFILE = SearchProfile(
    scenario_tokens=POOLED, peak=0.0, pooled=18.0, rank_copies=32.0, node_copies=4.0
)
TRACE_PROFILE = SearchProfile(
    scenario_tokens=0,
    peak=0.05,
    pooled=0.0,
    rank_copies=0.1,
    node_copies=1.0,
)
TIME_PROFILES = (
    SearchProfile(),
    SearchProfile(scenario_tokens=256),
    SearchProfile(scenario_tokens=1024),
    SearchProfile(scenario_tokens=512, peak=2.0, pooled=4.0),
    SearchProfile(scenario_tokens=0),
)
"""Candidates; the first one is used where there is no time or data to choose."""


def few_ranks_profile(weight: float = 1.0) -> SearchProfile:
    """What `Favour.FEW_RANKS` searches for: few ranks per token, by `weight`."""
    return replace(
        FEW_RANKS_PROFILE,
        rank_copies=weight * FEW_RANKS_PROFILE.rank_copies,
        node_copies=weight * FEW_RANKS_PROFILE.node_copies,
    )


def choose_profile(
    problem: PlacementProblem,
    options: SolverOptions,
    runner: Interruptible,
    clock: Clock,
    seconds: float,
) -> SearchProfile:
    """The `Favour.TIME` candidate with the least time of brief plans on the other half.

    Tries them on as many layers as it has time for. Gives up, for the first candidate,
    when that would take longer than `seconds` on a few layers already, or the traces
    cannot be cut in two.
    """
    began = clock.seconds
    if _halves(problem, options.seed) is None:
        return TIME_PROFILES[0]
    if seconds < math.inf:
        most = _layers_in_time(problem, options, runner, clock, seconds)
        if not most:
            return TIME_PROFILES[0]
        problem = some_layers(problem, most)
    totals = []
    for number, profile in enumerate(TIME_PROFILES, start=1):
        totals.append(sum(_trials(problem, profile, options, runner, seconds)))
        each = (clock.seconds - began) / number
        if runner.interrupted or each * len(TIME_PROFILES) > OVERRUN * seconds:
            return TIME_PROFILES[0]
    return TIME_PROFILES[totals.index(min(totals))]


def _layers_in_time(
    problem: PlacementProblem,
    options: SolverOptions,
    runner: Interruptible,
    clock: Clock,
    seconds: float,
) -> int:
    """Layers on which all candidates can be tried, by the time that one takes on few.

    None where time is too short for `MIN_TRIAL_LAYERS`, or for all where there are
    fewer.
    """
    few, began = some_layers(problem, MIN_TRIAL_LAYERS), clock.seconds
    next(_trials(few, TIME_PROFILES[0], options, runner, seconds))
    took = max(clock.seconds - began, 1e-9)
    each = 2 * len(TIME_PROFILES) * took / few.num_layers
    fit = int((seconds - took) / each)
    return fit if fit >= few.num_layers else 0


def _halves(problem: PlacementProblem, seed: int) -> tuple[Workload, Workload] | None:
    """The planning data in two parts; None where a trace cannot be cut."""
    workload = problem.workload
    splits = [split_by_sequence(t, 0.5, seed) for t in workload.traces]
    if not all(split.held_out for split in splits):
        return None
    return (
        replace(workload, traces=tuple(split.plan for split in splits)),
        replace(workload, traces=tuple(split.score for split in splits)),
    )


def _trials(
    problem: PlacementProblem,
    profile: SearchProfile,
    options: SolverOptions,
    runner: Interruptible,
    seconds: float,
) -> Iterator[float]:
    """Seconds on one half of a brief search on the other, both ways round."""
    halves = _halves(problem, options.seed)
    assert halves is not None
    for plan, score in (halves, halves[::-1]):
        part = PlacementProblem.from_workload(
            plan, problem.topology, slots_per_rank=problem.slots_per_rank
        )
        rounds = LayerRounds(
            problem=part,
            options=options,
            profile=profile,
            start=balanced_rank_of(part),
            runner=runner,
        )
        rounds.round(TRIAL_PROPOSALS, seconds)
        yield score.seconds(place(part, rounds.rank_of))
