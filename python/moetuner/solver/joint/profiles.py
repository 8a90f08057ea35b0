"""How much a search smooths: chosen on planning data that it did not see.

A search that fits its batches too closely loses in load on others what it gains in
copies. Each candidate plans briefly on one half of the sequences and is scored on the
other, both ways round; the part that the plan is scored on later is never looked at.
"""

from __future__ import annotations

import enum
from dataclasses import replace
from typing import TYPE_CHECKING

from moetuner.problem import PlacementProblem
from moetuner.solver.base import place
from moetuner.solver.heuristics.lpt import balanced_rank_of
from moetuner.solver.joint.layers import LayerRounds
from moetuner.solver.joint.scenarios import POOLED, SearchProfile
from moetuner.trace import split_by_sequence

if TYPE_CHECKING:
    from moetuner.evaluation.workload import Workload
    from moetuner.solver.base import Clock, SolverOptions
    from moetuner.solver.joint.interruptible import Interruptible

TRIAL_PROPOSALS = 2_000
"""Proposals per layer of a trial."""


class Favour(str, enum.Enum):
    """What decides where the modelled time leaves a choice."""

    TIME = "time"
    """The mean time of batches that were not planned on."""
    COPIES = "copies"
    """Few ranks per token at even loads, for links slower than the model's; see
    `copies_profile`."""
    TRACE = "trace"
    """The time of the trace's own batches and next to nothing beside it: for proofs.
    Other batches take longer than with `TIME`."""


COPIES_PROFILE = SearchProfile(
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


def copies_profile(weight: float = 1.0) -> SearchProfile:
    """What `Favour.COPIES` searches for: `weight` times fewer copies for even loads."""
    return replace(
        COPIES_PROFILE,
        rank_copies=weight * COPIES_PROFILE.rank_copies,
        node_copies=weight * COPIES_PROFILE.node_copies,
    )


def choose_profile(
    problem: PlacementProblem,
    options: SolverOptions,
    runner: Interruptible,
    clock: Clock,
    seconds: float,
) -> SearchProfile:
    """The `Favour.TIME` candidate with the least time of brief plans on the other half.

    Gives up, for the first candidate, when the trials would take longer than `seconds`
    or the traces cannot be cut in two.
    """
    workload = problem.workload
    splits = [split_by_sequence(t, 0.5, options.seed) for t in workload.traces]
    if not all(split.held_out for split in splits):
        return TIME_PROFILES[0]
    halves = [
        replace(workload, traces=tuple(getattr(split, part) for split in splits))
        for part in ("plan", "score")
    ]
    end = clock.seconds + seconds
    totals = []
    for profile in TIME_PROFILES:
        totals.append(
            sum(
                _trial(
                    problem, halves[i], halves[1 - i], profile, options, runner, seconds
                )
                for i in range(2)
            )
        )
        each = (clock.seconds - end + seconds) / len(totals)
        if runner.interrupted or each * len(TIME_PROFILES) > seconds:
            return TIME_PROFILES[0]
    return TIME_PROFILES[totals.index(min(totals))]


def _trial(
    problem: PlacementProblem,
    plan: Workload,
    score: Workload,
    profile: SearchProfile,
    options: SolverOptions,
    runner: Interruptible,
    seconds: float,
) -> float:
    """Seconds on `score` of a brief search on `plan`."""
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
    return score.seconds(place(part, rounds.rank_of))
