"""What a child process does with programs: CBC through python-mip.

See `moetuner._workers`. CBC's own log goes into a pipe, which a thread reads for
incumbents and bounds.
"""

from __future__ import annotations

import ctypes
import os
import re
import threading
import time
from typing import IO, TYPE_CHECKING, Any

import mip
import numpy as np

if TYPE_CHECKING:
    from collections.abc import Callable

    from numpy.typing import NDArray

    from moetuner.solver.programs.cbc import MilpTask
    from moetuner.solver.programs.model import MilpModel

    Standing = tuple[float | None, float | None]
    """Incumbent and bound."""

#     Nodes   OnTree  Depth         BestSol Method       BestBound     Gap%   Time(s)
#      3433      302     50       0.0214808                   0.01   95.00%      2.20
_NODES = re.compile(
    r"^\s*\d\S*\s+\d\S*\s+\d+\s+([-+\d.e]+)\s(?:.*\s)?([-+\d.e]+)\s+[\d.]+%\s"
)
_LOG_ROUNDING = 1e-5  # six digits are printed; a rounded bound must not be too high
_UNBOUNDED = 1e30
# CBC looks at the clock between nodes, so it is told to end a little early.
_MARGIN_SECONDS = 1.0
_MARGIN_SHARE = 0.1
_END = "moetuner: end of this program's log\n"


class Cbc:
    """Solves programs, one after the other; news are (incumbent, bound)."""

    def __init__(self) -> None:
        read_end, write_end = os.pipe()
        os.dup2(write_end, 1)
        log = os.fdopen(read_end, encoding="utf-8", errors="replace")
        self._tell: Callable[[Standing], None] = lambda _: None
        self._read = threading.Event()
        threading.Thread(target=self._follow, args=(log,), daemon=True).start()

    def __call__(
        self, task: MilpTask, until: float, tell: Callable[[Standing], None]
    ) -> tuple[str, NDArray[np.float64] | None, float | None]:
        """(CBC's status, x [n] or None, bound or None)."""
        self._tell = tell
        self._read.clear()
        found = _solve(task, until)
        # What the log says of this program must not be taken for news of the next one.
        ctypes.CDLL(None).fflush(None)
        os.write(1, f"\n{_END}".encode())
        self._read.wait()
        return found

    def _follow(self, log: IO[str]) -> None:
        for line in log:
            if line == _END:
                self._read.set()
            elif found := _NODES.search(line):
                incumbent, bound = (_finite(float(text)) for text in found.groups())
                if bound is not None:
                    bound -= _LOG_ROUNDING * abs(bound)
                self._tell((incumbent, bound))


def _solve(
    task: MilpTask, until: float
) -> tuple[str, NDArray[np.float64] | None, float | None]:
    program = task.model
    model = mip.Model(sense=mip.MINIMIZE, solver_name=mip.CBC)
    # verbose = 0 would silence the log; python-mip crashes when it keeps a progress
    # log without it.
    model.verbose = 1
    model.threads = 1
    model.seed = task.seed
    model.max_mip_gap_abs = task.gap_absolute
    model.max_mip_gap = 0.0
    columns = [
        model.add_var(
            lb=lower,
            ub=upper,
            obj=cost,
            var_type=mip.INTEGER if integer else mip.CONTINUOUS,
        )
        for cost, lower, upper, integer in zip(
            program.objective.tolist(),
            program.lower.tolist(),
            program.upper.tolist(),
            program.integer.tolist(),
            strict=True,
        )
    ]
    _add_rows(model, columns, program)
    if program.start.size:
        model.start = [
            (columns[j], float(program.start[j]))
            for j in np.flatnonzero(program.integer)
        ]
    left = max(until - time.time(), 0.0)  # building the model took some
    seconds = left - min(_MARGIN_SECONDS, _MARGIN_SHARE * left)
    status = model.optimize(max_seconds=max(seconds, 0.01))
    found = model.num_solutions
    x = np.array([column.x for column in columns], np.float64) if found else None
    return status.name, x, _finite(model.objective_bound)


def _add_rows(model: Any, columns: list[Any], program: MilpModel) -> None:
    begin = program.row_begin.tolist()
    indices, values = program.columns.tolist(), program.values.tolist()
    lowers, uppers = program.row_lower.tolist(), program.row_upper.tolist()
    for i, (lower, upper) in enumerate(zip(lowers, uppers, strict=True)):
        members = [columns[j] for j in indices[begin[i] : begin[i + 1]]]
        factors = values[begin[i] : begin[i + 1]]
        if lower == upper:
            model.add_constr(mip.LinExpr(members, factors, -lower, "="))
            continue
        if upper < np.inf:
            model.add_constr(mip.LinExpr(members, factors, -upper, "<"))
        if lower > -np.inf:
            model.add_constr(mip.LinExpr(members, factors, -lower, ">"))


def _finite(value: float | None) -> float | None:
    """CBC says "no bound yet" with huge numbers."""
    return None if value is None or not abs(value) < _UNBOUNDED else value
