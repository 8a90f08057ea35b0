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
    "contiguous": "ContiguousSolver",
    "random": "RandomSolver",
    "lpt": "LptSolver",
    "eplb": "EplbSolver",
    "affinity": "AffinitySolver",
    "coactivation": "CoactivationSolver",
    "chain": "ChainSolver",
    "ilp1": "Ilp1Solver",
    "ilp2": "Ilp2Solver",
    "exact": "ExactSolver",
    "joint_ilp": "JointIlpSolver",
    "joint": "JointSolver",
    "lns": "LnsSolver",
    "oracle": "OracleSolver",
}
"""Class of each solver by name; ``moetuner.solver.<name>`` is its module."""


def get_solver(name: str) -> Solver:
    """Return a solver with its default options; its module is imported only now.

    Raises
    ------
    SolverError
        When there is no solver of that name.
    """
    if name not in SOLVERS:
        raise SolverError(f"unknown solver {name!r}; there are {', '.join(SOLVERS)}")
    module = importlib.import_module(f"moetuner.solver.{name}")
    return cast("Solver", getattr(module, SOLVERS[name])())
