"""Solvers: a problem goes in, a placement with its proof (or gap) comes out."""

from __future__ import annotations

import importlib
from typing import cast

from moetuner.errors import SolverError
from moetuner.solver.base import (
    ProgressCallback,
    ProgressEvent,
    Solution,
    Solver,
    SolverOptions,
    SolveStatus,
    Stage,
)

__all__ = [
    "SOLVERS",
    "ProgressCallback",
    "ProgressEvent",
    "Solution",
    "SolveStatus",
    "Solver",
    "SolverOptions",
    "Stage",
    "get_solver",
]

SOLVERS = {
    "contiguous": "heuristics.contiguous.ContiguousSolver",
    "random": "heuristics.random.RandomSolver",
    "lpt": "heuristics.lpt.LptSolver",
    "eplb": "heuristics.eplb.EplbSolver",
    "affinity": "heuristics.affinity.AffinitySolver",
    "coactivation": "heuristics.coactivation.CoactivationSolver",
    "chain": "heuristics.chain.ChainSolver",
    "ilp1": "programs.ilp1.Ilp1Solver",
    "ilp2": "programs.ilp2.Ilp2Solver",
    "ilp": "programs.ilp.IlpSolver",
    "exact": "exact.exact.ExactSolver",
    "joint": "joint.solver.JointSolver",
}
"""Room, module and class of each solver, by name."""


def get_solver(name: str, config: object = None) -> Solver:
    """Return a solver; its module is imported only now.

    Parameters
    ----------
    name
        One of `SOLVERS`.
    config
        The solver's own options, of the class of its ``config``; None: its defaults.

    Raises
    ------
    SolverError
        When there is no solver of that name, or its options are of another class.
    """
    if name not in SOLVERS:
        raise SolverError(f"unknown solver {name!r}; there are {', '.join(SOLVERS)}")
    module, _, made = SOLVERS[name].rpartition(".")
    solver = getattr(importlib.import_module(f"moetuner.solver.{module}"), made)
    default = cast("Solver", solver())
    if config is None:
        return default
    wanted = type(default.config)
    if type(config) is not wanted:
        raise SolverError(
            f"solver {name}: config must be of class {wanted.__name__}, got {config!r}"
        )
    return cast("Solver", solver(config=config))
