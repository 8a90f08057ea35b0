"""The placements that are compared, and what each is planned for."""

from __future__ import annotations

import time
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from moetuner import (
    Homes,
    Objective,
    PlacementProblem,
    SolverOptions,
    Wire,
    Workload,
    get_solver,
)
from moetuner.errors import MissingDependencyError, MoetunerError

if TYPE_CHECKING:
    from moetuner import BatchKind, CostModel, Placement, Topology
    from moetuner.trace import Trace

SECONDS_OF_QUICK = 10.0


@dataclass(frozen=True, kw_only=True)
class Planner:
    """A solver, what it minimises, and the slots that it has to spare."""

    solver: str
    objective: Objective
    extra_slots: int = 0
    homes: Homes = Homes.UNIFORM
    wire: Wire = Wire.DEDUP


_TIME = Objective.MODELLED_TIME
PLANNERS = {
    "contiguous": Planner(solver="contiguous", objective=Objective.MAX_LOAD),
    "random": Planner(solver="random", objective=Objective.MAX_LOAD),
    "lpt": Planner(solver="lpt", objective=Objective.MAX_LOAD),
    "lpt, chain": Planner(solver="chain", objective=Objective.LINK_TRAFFIC),
    "eplb": Planner(solver="eplb", objective=Objective.MAX_LOAD),
    "eplb + replicas": Planner(solver="eplb", objective=_TIME, extra_slots=1),
    "paper": Planner(solver="ilp2", objective=Objective.LINK_TRAFFIC),
    "affinity": Planner(solver="affinity", objective=Objective.TOTAL_TRAFFIC),
    "joint": Planner(solver="joint", objective=_TIME),
    "joint + replicas": Planner(solver="joint", objective=_TIME, extra_slots=1),
    "joint for per-expert": Planner(
        solver="joint", objective=_TIME, wire=Wire.PER_EXPERT
    ),
    "joint for follow": Planner(
        solver="joint",
        objective=_TIME,
        homes=Homes.FOLLOW,
        wire=Wire.DEDUP_RANKS,
    ),
}
UNHURRIED = ("joint", "ilp2")  # solvers that use the time they are given


@dataclass(frozen=True, kw_only=True)
class Asked:
    """What all planners are asked."""

    trace: Trace
    cost: CostModel
    topology: Topology
    batch_tokens: int
    batch_kind: BatchKind
    seconds: float
    seed: int


def plan(name: str, asked: Asked) -> tuple[Placement | None, str]:
    """A placement and how long it took; or none, and why."""
    planner = PLANNERS[name]
    if planner.homes is Homes.FOLLOW and not asked.trace.ranked:
        return None, "the recording does not say which expert of a token is its first"
    cost = replace(asked.cost, wire=planner.wire, homes=planner.homes)
    workload = Workload(
        traces=(asked.trace,),
        cost=cost,
        batch_tokens=asked.batch_tokens,
        batch_kind=asked.batch_kind,
    )
    begun = time.perf_counter()
    try:
        problem = PlacementProblem.from_workload(
            workload, asked.topology, objective=planner.objective
        )
        slots = problem.slots_per_rank + planner.extra_slots
        problem = replace(problem, slots_per_rank=slots)
        unhurried = planner.solver in UNHURRIED
        limit = asked.seconds if unhurried else SECONDS_OF_QUICK
        options = SolverOptions(time_limit=limit, seed=asked.seed)
        found = get_solver(planner.solver).solve(problem, options)
    except MissingDependencyError as error:
        return None, str(error)
    except MoetunerError as error:
        return None, f"{type(error).__name__}: {error}"
    return found.placement, f"{time.perf_counter() - begun:.1f} s, {found.status.value}"
