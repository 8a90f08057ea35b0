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

if TYPE_CHECKING:
    from collections.abc import Mapping

    from moetuner.evaluation.evaluate import Draws
    from moetuner.problem import PlacementProblem

REFERENCE = "contiguous"
"""What gains are measured against where nobody says otherwise."""
IN_USE = "in use"
"""The placement that a plan starts from: where there is one, gains and moves count from
it."""
PLANNED_ON_NOTHING = (REFERENCE, "random")
WITH_REPLICAS = "eplb+replica"
_QUICK = (
    *PLANNED_ON_NOTHING,
    *("lpt", "eplb", WITH_REPLICAS, "affinity", "coactivation", "chain"),
)
_SLOW = ("ilp2",)
_LEFT_OUT = (MissingDependencyError, MissingStatisticsError, SolverError)
BASELINES = (*_QUICK, *_SLOW)
"""Names of all; those of solvers, but for `WITH_REPLICAS`."""
QUICK_SECONDS = 10.0
"""Time limit of each quick one; all that do without CBC end long before on 64 experts.
"""


class Baselines(str, enum.Enum):
    """Which baselines stand beside a plan."""

    NONE = "none"
    """Contiguous blocks alone: gains need them."""
    UNPLANNED = "unplanned"
    """And a random placement: what no token was planned on."""
    QUICK = "quick"
    """Those that take seconds."""
    ALL = "all"
    """And the paper's two integer programs, ``ilp2``, with the time that the plan's
    solver has."""


@dataclass(frozen=True, kw_only=True, slots=True)
class SolvedBaselines:
    """Baselines by name, and why others are missing."""

    solutions: dict[str, Solution]
    left_out: dict[str, str]


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
    hurry: bool = False,
) -> SolvedBaselines:
    """Answers of all `wanted` to a problem, with equal slots on every rank.

    Each minimises what it is for, whatever the problem's objective; only
    `WITH_REPLICAS` uses slots to spare for replicas. Left out are those of the solver
    `skip`, and, with the reason, those that this problem has not enough for, those
    whose CBC is not installed and, in a `hurry`, all but contiguous blocks.
    """
    solutions: dict[str, Solution] = {}
    left_out: dict[str, str] = {}
    for name in _names(problem, wanted):
        if solver_of(name) == skip:
            continue
        if hurry and name != REFERENCE:
            left_out[name] = "the plan was interrupted"
            continue
        try:
            solutions[name] = _solve(problem, name, options)
        except _LEFT_OUT as error:
            left_out[name] = str(error)
    return SolvedBaselines(solutions=solutions, left_out=left_out)


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


def _names(problem: PlacementProblem, wanted: Baselines) -> tuple[str, ...]:
    if wanted is Baselines.NONE:
        return (REFERENCE,)
    if wanted is Baselines.UNPLANNED:
        return PLANNED_ON_NOTHING
    spare = problem.wants_replicas
    names = BASELINES if wanted is Baselines.ALL else _QUICK
    return tuple(name for name in names if spare or name != WITH_REPLICAS)


def _solve(problem: PlacementProblem, name: str, options: SolverOptions) -> Solution:
    solver = get_solver(solver_of(name))
    objective = solver.objectives[0]
    if name == "eplb":
        objective = Objective.MAX_LOAD  # of an expert that has one place
    if name not in _SLOW:
        limit = min(options.time_limit, QUICK_SECONDS)
        options = replace(options, time_limit=limit)
    asked = replace(problem, objective=objective)
    return solver.solve(asked, options)
