"""The same programs with HiGHS, through SciPy: a second opinion on what CBC says."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
from scipy.optimize import Bounds, LinearConstraint, milp
from scipy.sparse import csr_array

from moetuner.solver.base import SolveStatus
from moetuner.solver.programs.cbc import MilpResult

if TYPE_CHECKING:
    from moetuner.solver.programs.model import MilpModel

_OPTIMAL, _LIMIT = 0, 1
_TOLERANCE = 1e-6
"""HiGHS keeps rows and whole numbers to this; bounds are lowered by as much."""


def solve_milp(
    model: MilpModel, *, time_limit: float, gap_relative: float = 0.0
) -> MilpResult:
    """Solve one program in this process; its start is not used.

    Raises
    ------
    ValueError
        When HiGHS calls the program infeasible or unbounded.
    """
    shape = (model.num_rows, model.num_columns)
    rows: Any = csr_array((model.values, model.columns, model.row_begin), shape=shape)
    found = milp(
        model.objective,
        integrality=model.integer.astype(np.int64),
        bounds=Bounds(model.lower, model.upper),
        constraints=LinearConstraint(rows, model.row_lower, model.row_upper),
        options={"time_limit": max(time_limit, 0.01), "mip_rel_gap": gap_relative},
    )
    if found.status not in (_OPTIMAL, _LIMIT):
        raise ValueError(f"solver highs: {found.message}")
    bound = found.mip_dual_bound
    scale = 1 + abs(float(np.abs(model.objective).max(initial=0.0)))
    return MilpResult(
        status=SolveStatus.OPTIMAL
        if found.status == _OPTIMAL
        else SolveStatus.TIME_LIMIT,
        x=None if found.x is None else np.asarray(found.x, np.float64),
        bound=None
        if bound is None or not np.isfinite(bound)
        else float(bound) - _TOLERANCE * scale,
    )
