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
    "exact": "exact.exact.ExactSolver",
    "joint_ilp": "programs.joint_ilp.JointIlpSolver",
    "joint": "joint.solver.JointSolver",
    "lns": "programs.lns.LnsSolver",
    "oracle": "exact.oracle.OracleSolver",
}
"""Room, module and class of each solver, by name."""


def get_solver(name: str) -> Solver:
    """Return a solver with its default options; its module is imported only now.

    Raises
    ------
    SolverError
        When there is no solver of that name.
    """
    if name not in SOLVERS:
        raise SolverError(f"unknown solver {name!r}; there are {', '.join(SOLVERS)}")
    module, _, made = SOLVERS[name].rpartition(".")
    solver = getattr(importlib.import_module(f"moetuner.solver.{module}"), made)
    return cast("Solver", solver())
