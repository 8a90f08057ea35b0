"""Child process that solves programs with CBC through python-mip, one after the other.

Started by `moetuner.solver.programs.cbc`. On what was standard output when it started
it first says ``{"ready"}``: CBC was loaded. On standard input it reads frames: a JSON
line with the limits and the size, then a NumPy archive of that size with the fields of
`MilpModel`. For each it answers JSON lines: ``{"incumbent", "bound"}`` while CBC runs,
then ``{"status", "x", "bound"}``. CBC's own log goes into a pipe that a thread reads
for those incumbents and bounds.
"""

from __future__ import annotations

import io
import json
import os
import queue
import re
import sys
import threading
import time
from typing import IO, Any

import mip
import numpy as np

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


def main() -> None:
    """Serve programs until standard input ends, even in the middle of one."""
    answers = os.fdopen(os.dup(1), "w", buffering=1, encoding="utf-8")
    read_end, write_end = os.pipe()
    answers.write('{"ready": true}\n')
    os.dup2(write_end, 1)
    log = os.fdopen(read_end, encoding="utf-8", errors="replace")
    threading.Thread(target=_report, args=(log, answers), daemon=True).start()
    frames: queue.SimpleQueue[tuple[dict[str, Any], bytes]] = queue.SimpleQueue()
    threading.Thread(target=_receive, args=(frames,), daemon=True).start()
    while True:
        limits, archive = frames.get()
        arrays = np.load(io.BytesIO(archive))
        answers.write(json.dumps(_solve(dict(arrays), **limits)) + "\n")


def _receive(frames: queue.SimpleQueue[tuple[dict[str, Any], bytes]]) -> None:
    while line := sys.stdin.buffer.readline():
        limits = json.loads(line)
        frames.put((limits, sys.stdin.buffer.read(limits.pop("size"))))
    os._exit(0)  # whoever asked is gone, perhaps killed: nobody wants an answer


def _report(log: IO[str], answers: IO[str]) -> None:
    for line in log:
        if found := _NODES.search(line):
            incumbent, bound = (_finite(float(text)) for text in found.groups())
            if bound is not None:
                bound -= _LOG_ROUNDING * abs(bound)
            answers.write(json.dumps({"incumbent": incumbent, "bound": bound}) + "\n")


def _solve(
    arrays: dict[str, Any], deadline: float, gap_absolute: float, seed: int
) -> dict[str, Any]:
    model = mip.Model(sense=mip.MINIMIZE, solver_name=mip.CBC)
    # verbose = 0 would silence the log; python-mip crashes when it keeps a progress
    # log without it.
    model.verbose = 1
    model.threads = 1
    model.seed = seed
    model.max_mip_gap_abs = gap_absolute
    model.max_mip_gap = 0.0
    columns = [
        model.add_var(
            lb=lower,
            ub=upper,
            obj=cost,
            var_type=mip.INTEGER if integer else mip.CONTINUOUS,
        )
        for cost, lower, upper, integer in zip(
            arrays["objective"].tolist(),
            arrays["lower"].tolist(),
            arrays["upper"].tolist(),
            arrays["integer"].tolist(),
            strict=True,
        )
    ]
    _add_rows(model, columns, arrays)
    if arrays["start"].size:
        model.start = [
            (columns[j], float(arrays["start"][j]))
            for j in np.flatnonzero(arrays["integer"])
        ]
    left = max(deadline - time.time(), 0.0)  # building the model took some
    seconds = left - min(_MARGIN_SECONDS, _MARGIN_SHARE * left)
    status = model.optimize(max_seconds=max(seconds, 0.01))
    x = [column.x for column in columns] if model.num_solutions else None
    return {"status": status.name, "x": x, "bound": _finite(model.objective_bound)}


def _add_rows(model: Any, columns: list[Any], arrays: dict[str, Any]) -> None:
    begin = arrays["row_begin"].tolist()
    indices, values = arrays["columns"].tolist(), arrays["values"].tolist()
    lowers, uppers = arrays["row_lower"].tolist(), arrays["row_upper"].tolist()
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
