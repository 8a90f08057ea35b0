"""Whether replicas pay: they are tried on a plan without them that took a moment.

On a plan that is only balanced they would seem to: a search often finds without them
what they gain there. So it is searched for as long as half the trial may take, on as
few layers as tell.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from moetuner.solver.base import Clock
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
"""Layers that are asked where they do not depend on each other, and those of the
hottest experts: where these gain nothing none does."""
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
    roomy = problem if counted else some_layers(problem, TRIAL_LAYERS, HOT_LAYERS)
    tight = without_spare(roomy)
    brief = LayerRounds(
        problem=tight,
        options=options,
        profile=profile,
        start=balanced_rank_of(tight),
        runner=runner,
    )
    if searches:
        Schedule(
            clock=part,
            runner=runner,
            max_rounds=0,
            patience=1,
            report=lambda *_: None,
        ).run(brief, TRIAL_PROPOSALS, SEARCH_SHARE)
    plain = widened(brief.placement, roomy)
    before = roomy.objective_value(plain)
    if not part.left:
        return None
    began = part.seconds
    best, *seen = cheapest_layers(roomy, filled(roomy, [plain]), part)
    value = roomy.objective_value(best)
    whole = roomy.num_layers == problem.num_layers
    fill = (part.seconds - began) / len(seen)
    return Trial(
        gain=1 - value / before,
        fill_seconds=fill * problem.num_layers / roomy.num_layers,
        found=((plain, before), (best, value)) if whole else (),
    )
