"""Whether replicas pay: they are tried on a plan without them that took a moment.

Where a plan that is only balanced gains nothing by them in the layers of the hottest
experts no other does anywhere. Where it does gain, a search often finds as much without
them: then it is searched for as long as half the trial may take, on as few layers as
tell.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from moetuner.evaluation.cost import Homes
from moetuner.solver.base import Clock, place
from moetuner.solver.heuristics.lpt import balanced_rank_of
from moetuner.solver.joint.layers import LayerRounds
from moetuner.solver.joint.profiles import TRIAL_PROPOSALS
from moetuner.solver.joint.replan import widened
from moetuner.solver.joint.replicas import cheapest_layers, filled, without_spare
from moetuner.solver.joint.schedule import Schedule
from moetuner.solver.joint.some_layers import some_layers

if TYPE_CHECKING:
    from moetuner.placement.model import Placement
    from moetuner.problem import PlacementProblem
    from moetuner.solver.base import SolverOptions
    from moetuner.solver.joint.interruptible import Interruptible
    from moetuner.solver.joint.scenarios import SearchProfile

TRIAL_LAYERS, HOT_LAYERS = 8, 4
"""Layers that are asked, and those of the hottest experts, which are asked first."""
FIRST_SHARE = 3.0
"""Of the trial's time, what the first layers may take: they save what comes after."""
SEARCH_SHARE = 0.5
"""Of the trial's time, that of the plan without replicas."""


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Trial:
    """Replicas on a plan of a moment."""

    gain: float
    """Of that plan."""
    fill_seconds: float
    """To make one filling of all layers and to value it."""
    found: tuple[tuple[Placement, float], ...]
    """The plan, and each layer as it takes least, with their times; nothing where only
    some layers were asked."""

    @property
    def is_futile(self) -> bool:
        """Whether no layer that was asked gains anything."""
        return not self.found and self.gain <= 0


def try_replicas(
    problem: PlacementProblem,
    options: SolverOptions,
    profile: SearchProfile,
    runner: Interruptible,
    seconds: float,
    *,
    searches: bool,
) -> Trial | None:
    """What replicas gain, in about so many seconds; None where that is too short.

    Without `searches` the plan is only balanced. Of counts all layers are asked: they
    take no time, and the trial is what is known of single ones.
    """
    part = Clock(time_limit=seconds)
    counted = problem.workload.counted
    if not counted and problem.num_layers > HOT_LAYERS:
        hottest = some_layers(_alone(problem), 0, HOT_LAYERS)
        first = Clock(time_limit=FIRST_SHARE * seconds)
        known = _fill(hottest, _balanced(hottest), first, problem.num_layers)
        if known is None or known.is_futile:
            return known
    roomy = problem if counted else some_layers(problem, TRIAL_LAYERS, HOT_LAYERS)
    plan = _balanced(roomy)
    if searches:
        brief = LayerRounds(
            problem=without_spare(roomy),
            options=options,
            profile=profile,
            start=plan.rank_of(),
            runner=runner,
        )
        Schedule(
            clock=part,
            runner=runner,
            max_rounds=0,
            patience=1,
            report=lambda *_: None,
        ).run(brief, TRIAL_PROPOSALS, SEARCH_SHARE)
        plan = brief.placement
    return _fill(roomy, plan, part, problem.num_layers)


def _alone(problem: PlacementProblem) -> PlacementProblem:
    """With layers that do not depend on each other: five times as fast to tally."""
    cost = problem.workload.cost
    if cost.homes is not Homes.FOLLOW:
        return problem
    workload = replace(problem.workload, cost=replace(cost, homes=Homes.UNIFORM))
    return replace(problem, workload=workload)


def _balanced(problem: PlacementProblem) -> Placement:
    tight = without_spare(problem)
    return place(tight, balanced_rank_of(tight))


def _fill(
    problem: PlacementProblem, placement: Placement, clock: Clock, num_layers: int
) -> Trial | None:
    """What replicas by simple rules gain of it, on some of so many layers or on all.

    None where there was no time for any rule; on some layers, where there was none for
    all and those that were tried gain nothing.
    """
    began = clock.seconds
    plain = widened(placement, problem)
    before = problem.objective_value(plain)
    if not clock.left:
        return None
    best, *seen = cheapest_layers(problem, filled(problem, [plain]), clock)
    value = problem.objective_value(best)
    whole = problem.num_layers == num_layers
    if not whole and not clock.left and not value < before:
        return None
    each = (clock.seconds - began) / len(seen)
    return Trial(
        gain=1 - value / before,
        fill_seconds=each * num_layers / problem.num_layers,
        found=((plain, before), (best, value)) if whole else (),
    )
