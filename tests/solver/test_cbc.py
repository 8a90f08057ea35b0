"""The children that run CBC: how they start, what they may claim."""

import numpy as np
import pytest
from moetuner.errors import MissingDependencyError
from moetuner.solver.base import SolveStatus
from moetuner.solver.cbc import solve_milps
from moetuner.solver.milp import MilpBuilder


def model():
    """min x + y, x + y >= 1.5 over integers: 2."""
    builder = MilpBuilder()
    columns = builder.add_columns(2, objective=1.0, upper=3.0, integer=True)
    builder.add_row(columns, lower=1.5)
    return builder.build()


def test_nothing_is_imported_from_the_working_directory(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("mip", "queue", "numpy"):
        (tmp_path / f"{name}.py").write_text("raise SystemExit('imported')")
    (result,) = solve_milps([model()], time_limit=10)
    assert result.status is SolveStatus.OPTIMAL
    assert np.sum(result.x) == pytest.approx(2)


def test_a_cbc_that_cannot_be_loaded_is_named_not_passed_over(tmp_path, monkeypatch):
    (tmp_path / "mip.py").write_text("raise ImportError('no CBC for this machine')")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(MissingDependencyError, match="no CBC for this machine"):
        solve_milps([model()], time_limit=10)
