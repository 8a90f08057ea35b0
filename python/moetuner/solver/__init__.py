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


def get_solver(name: str, config: object = None) -> Solver:
    """Return a solver; its module is imported only now.

    Parameters
    ----------
    name
        In `SOLVERS`.
    config
        Its own options, `moetuner.solver.joint.config.JointConfig` say; None means its
        defaults.

    Raises
    ------
    SolverError
        When there is no solver of that name, or the options are another solver's.
    """
    if name not in SOLVERS:
        raise SolverError(f"unknown solver {name!r}; there are {', '.join(SOLVERS)}")
    module, _, made = SOLVERS[name].rpartition(".")
    solver = getattr(importlib.import_module(f"moetuner.solver.{module}"), made)
    if config is None:
        return cast("Solver", solver())
    own = type(getattr(solver(), "config", None))
    if own is type(None) or not isinstance(config, own):
        wanted = "takes no config" if own is type(None) else f"wanted {own.__name__}"
        raise SolverError(f"solver {name}: {wanted}, got {type(config).__name__}")
    return cast("Solver", solver(config=config))
