"""The placements that are compared, and what each is planned for."""

from __future__ import annotations

import time
from concurrent.futures import ProcessPoolExecutor
from contextlib import nullcontext
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from moetuner import (
    BatchKind,
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
    from argparse import Namespace
    from collections.abc import Sequence

    from case import Case
    from moetuner import CostModel, Placement, Topology
    from moetuner.trace import Trace

SECONDS_OF_QUICK = 10.0


@dataclass(frozen=True, kw_only=True)
class Planner:
    """A solver, what it minimises, and whether it may use slots to spare."""

    solver: str
    objective: Objective
    replicas: bool = False
    homes: Homes = Homes.UNIFORM
    wire: Wire = Wire.DEDUP


_TIME = Objective.MODELLED_TIME
PLANNERS = {
    "contiguous": Planner(solver="contiguous", objective=Objective.MAX_LOAD),
    "random": Planner(solver="random", objective=Objective.MAX_LOAD),
    "lpt": Planner(solver="lpt", objective=Objective.MAX_LOAD),
    "lpt, chain": Planner(solver="chain", objective=Objective.LINK_TRAFFIC),
    "eplb": Planner(solver="eplb", objective=Objective.MAX_LOAD),
    "eplb + replicas": Planner(solver="eplb", objective=_TIME, replicas=True),
    "paper": Planner(solver="ilp2", objective=Objective.LINK_TRAFFIC),
    "affinity": Planner(solver="affinity", objective=Objective.TOTAL_TRAFFIC),
    "joint": Planner(solver="joint", objective=_TIME),
    "joint + replicas": Planner(solver="joint", objective=_TIME, replicas=True),
    "joint for per-expert": Planner(
        solver="joint", objective=_TIME, wire=Wire.PER_EXPERT
    ),
    "joint for follow": Planner(solver="joint", objective=_TIME, homes=Homes.FOLLOW),
}
UNHURRIED = ("joint", "ilp2")  # solvers that use the time they are given
PRICED = [name for name, one in PLANNERS.items() if one.solver == "joint"]
"""Those that another machine or network makes other placements of."""


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
    threads: int
    spare: int
    """Slots that a rank has beyond its equal share, where a planner may use them."""

    @classmethod
    def of(cls, case: Case, trace: Trace, options: Namespace) -> Asked:
        """For the batches that the case names, on its machine, as `plan.py` is told."""
        sizes, ranks = case.sizes, case.topology.num_ranks
        decode = case.plan_for == "decode"
        return cls(
            trace=trace,
            cost=case.cost,
            topology=case.topology,
            batch_tokens=ranks * (sizes.sequences if decode else sizes.tokens),
            batch_kind=BatchKind.MIXED if decode else BatchKind.SEQUENCES,
            seconds=options.seconds,
            seed=options.seed,
            threads=options.threads,
            spare=options.spare,
        )


def plan_all(names: Sequence[str], asked: Asked, case: Case, jobs: int = 1) -> None:
    """Into the case; what cannot be planned is left out, and the case says why.

    What the case has of that name is where a search starts. As many placements as
    ``jobs`` says are planned at once, each in a process of its own.
    """
    starts = [case.placements.pop(name, None) for name in names]
    asks = [asked] * len(starts)
    with ProcessPoolExecutor(jobs) if jobs > 1 else nullcontext() as pool:
        found = (pool.map if pool else map)(plan, names, asks, starts)
        for name, (placement, case.told[name]) in zip(names, found, strict=True):
            if placement is not None:
                case.placements[name] = placement
            print(f"{name}: {case.told[name]}", flush=True)


def plan(
    name: str, asked: Asked, start: Placement | None = None
) -> tuple[Placement | None, str]:
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
        slots = problem.slots_per_rank + asked.spare * planner.replicas
        slots = start.slots_per_rank if start else slots
        problem = replace(problem, slots_per_rank=slots)
        unhurried = planner.solver in UNHURRIED
        limit = asked.seconds if unhurried else SECONDS_OF_QUICK
        options = SolverOptions(
            time_limit=limit, seed=asked.seed, threads=asked.threads
        )
        solver = get_solver(planner.solver)
        found = solver.solve(problem, options, warm_start=start)
    except MissingDependencyError as error:
        return None, str(error)
    except MoetunerError as error:
        return None, f"{type(error).__name__}: {error}"
    return found.placement, f"{time.perf_counter() - begun:.1f} s, {found.status.value}"
