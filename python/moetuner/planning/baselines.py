"""Simpler answers to the same question, which every plan has to beat."""

from __future__ import annotations

import enum
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from moetuner.errors import (
    MissingDependencyError,
    MissingStatisticsError,
    SolverError,
)
from moetuner.evaluation.evaluate import GainInterval, paired_gain
from moetuner.problem import Objective
from moetuner.solver import Solution, SolverOptions, get_solver
from moetuner.solver.joint.replan import widened
from moetuner.solver.joint.replicas import without_spare

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from moetuner.evaluation.evaluate import Draws
    from moetuner.problem import PlacementProblem
    from moetuner.solver.base import Clock

REFERENCE = "contiguous"
"""What gains are measured against where nobody says otherwise."""
IN_USE = "in use"
"""The placement that a plan starts from: where there is one, gains and moves count from
it."""
PLANNED_ON_NOTHING = (REFERENCE, "random")
WITH_REPLICAS = "eplb+replica"
QUICK = (
    *PLANNED_ON_NOTHING,
    *("lpt", "eplb", WITH_REPLICAS, "affinity", "coactivation", "chain"),
)
SLOW = ("ilp2",)
NO_TIME = "no time was left for it; a longer time limit gives more"
INTERRUPTED = "the plan was interrupted"
"""Why baselines are missing."""
_LEFT_OUT = (MissingDependencyError, MissingStatisticsError, SolverError)
BASELINES = (*QUICK, *SLOW)
"""Names of all; those of solvers, but for `WITH_REPLICAS`."""
QUICK_SECONDS = 10.0
"""Time limit of each quick one; all that do without CBC end long before on 64 experts.
"""
BASELINE_SHARE = 1 / 3
"""Of a plan's time, what the quick ones may take together with their scores."""
LEAST_SECONDS = 2.0
"""What they may take of a short one."""


class Baselines(str, enum.Enum):
    """Which baselines stand beside a plan."""

    NONE = "none"
    """Contiguous blocks alone: gains need them."""
    UNPLANNED = "unplanned"
    """And a random placement: what no token was planned on."""
    QUICK = "quick"
    """Those that take seconds."""
    ALL = "all"
    """And the paper's two integer programs, ``ilp2``: the plan's solver and they have
    half of what is left of the time each."""


@dataclass(frozen=True, kw_only=True, slots=True)
class SolvedBaselines:
    """Baselines by name, and why others are missing."""

    solutions: dict[str, Solution]
    left_out: dict[str, str]
    interrupted: bool = False
    """Whether the user stopped them."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Rival:
    """The baseline with the fastest mean batch, known only after scoring."""

    name: str
    gain: GainInterval | None
    """Of the result over it."""


def solver_of(name: str) -> str:
    """The solver behind a baseline."""
    return "eplb" if name == WITH_REPLICAS else name


def solve_baselines(
    problem: PlacementProblem,
    wanted: Baselines,
    options: SolverOptions,
    *,
    skip: str = "",
    among: tuple[str, ...] = BASELINES,
    hurry: bool = False,
    clock: Clock | None = None,
    on_solved: Callable[[str, Solution], None] | None = None,
) -> SolvedBaselines:
    """Answers of all `wanted` to a problem, with equal slots on every rank.

    Each minimises what it is for, whatever the problem's objective; only
    `WITH_REPLICAS` uses slots to spare for replicas. Left out are those of the solver
    `skip`, those not `among` the given, and, with the reason, those that this problem
    has not enough for, those whose CBC is not installed and, in a `hurry`, the slow
    ones.

    With a `clock`, no quick one is begun but the first after that has run out, and each
    gets at most half of what is left. `on_solved` gets each as soon as it is there;
    after a Ctrl-C, the first one there, no other is begun.
    """
    solutions: dict[str, Solution] = {}
    left_out: dict[str, str] = {}
    interrupted = False
    for name in baseline_names(problem, wanted):
        if solver_of(name) == skip or name not in among:
            continue
        if interrupted or (hurry and name in SLOW):
            left_out[name] = INTERRUPTED
            continue
        if clock is not None and not clock.left and solutions:
            left_out[name] = NO_TIME
            continue
        try:
            solution = _solve(problem, name, _limited(name, options, clock))
            if on_solved is not None:
                on_solved(name, solution)
            solutions[name] = solution
        except _LEFT_OUT as error:
            left_out[name] = str(error)
        except KeyboardInterrupt:
            if not solutions:
                raise
            interrupted = True
            left_out[name] = INTERRUPTED
    return SolvedBaselines(
        solutions=solutions, left_out=left_out, interrupted=interrupted
    )


def best_rival(
    result: str, draws: Mapping[str, Draws], reference: str = REFERENCE
) -> Rival | None:
    """The baseline with the fastest mean batch that is not the `result` itself.

    ``draws`` are paired; `reference`, what gains are measured against, is a baseline
    too. None when the times are unknown.
    """
    times = {name: float(each.seconds[0]) for name, each in draws.items()}
    rivals = dict.fromkeys((*BASELINES, reference))
    others = [n for n in rivals if n != result and times.get(n, 0.0) > 0]
    if not others:
        return None
    best = min(others, key=times.__getitem__)
    return Rival(name=best, gain=paired_gain(draws[best], draws[result]))


def baseline_names(problem: PlacementProblem, wanted: Baselines) -> tuple[str, ...]:
    """Those that stand beside a plan, in order."""
    if wanted is Baselines.NONE:
        return (REFERENCE,)
    if wanted is Baselines.UNPLANNED:
        return PLANNED_ON_NOTHING
    names = BASELINES if wanted is Baselines.ALL else QUICK
    if not problem.wants_replicas:
        return tuple(name for name in names if name != WITH_REPLICAS)
    # Last of the quick ones: in a short time the same ones as without spare slots.
    plain = [name for name in QUICK if name != WITH_REPLICAS]
    return (*plain, WITH_REPLICAS, *(name for name in names if name in SLOW))


def _limited(name: str, options: SolverOptions, clock: Clock | None) -> SolverOptions:
    """The options with the time that one baseline gets."""
    limit = options.time_limit
    if name not in SLOW:
        limit = min(limit, QUICK_SECONDS)
        if clock is not None:
            limit = min(limit, max(clock.left / 2, 1e-3))
    return replace(options, time_limit=limit)


def _solve(problem: PlacementProblem, name: str, options: SolverOptions) -> Solution:
    solver = get_solver(solver_of(name))
    objective = solver.objectives[0]
    if name == "eplb":
        objective = Objective.MAX_LOAD  # of an expert that has one place
    asked = replace(problem, objective=objective)
    if name == WITH_REPLICAS:
        return solver.solve(asked, options)
    # Slots to spare are for replicas: the same plans as without them, as fast.
    solution = solver.solve(without_spare(asked), options)
    wide = widened(solution.placement, problem)
    return replace(solution, placement=wide)
