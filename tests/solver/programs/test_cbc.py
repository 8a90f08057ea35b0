"""The children that run CBC: how they start, what they may claim."""

import itertools

import numpy as np
import pytest
from moetuner._workers import Ended, Outcome
from moetuner.errors import MissingDependencyError
from moetuner.solver.base import SolveStatus
from moetuner.solver.programs import cbc
from moetuner.solver.programs.cbc import CUTOFF_INCREMENT, solve_milps
from moetuner.solver.programs.model import MilpBuilder


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
        solve_milps([model()], time_limit=60)


def test_without_python_mip_the_message_says_what_to_install(tmp_path, monkeypatch):
    reason = "\"No module named 'mip'\""
    (tmp_path / "mip.py").write_text(f"raise ModuleNotFoundError({reason})")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(MissingDependencyError, match=r"install 'moetuner\[cbc\]'"):
        solve_milps([model()], time_limit=60)


def outcome(ended, **fields):
    return lambda *_, **__: [Outcome(ended=ended, **fields)]


@pytest.mark.parametrize(
    ("ended", "status"),
    [
        (Ended.DIED, SolveStatus.FAILED),
        (Ended.LATE, SolveStatus.TIME_LIMIT),
        (Ended.INTERRUPTED, SolveStatus.INTERRUPTED),
    ],
)
def test_how_a_child_ended_is_told(monkeypatch, ended, status):
    monkeypatch.setattr(cbc, "run_tasks", outcome(ended, seconds=2.0))
    (result,) = solve_milps([model()], time_limit=10)
    assert (result.status, result.x, result.seconds) == (status, None, 2.0)


def test_a_bound_that_was_told_outlives_the_child(monkeypatch):
    def cut_off(*_, on_news, **__):
        on_news(0, (3.0, 1.5))
        on_news(0, (2.0, None))
        return [Outcome(ended=Ended.LATE)]

    monkeypatch.setattr(cbc, "run_tasks", cut_off)
    told = []
    (result,) = solve_milps([model()], time_limit=10, on_news=told.append)
    assert result.bound == 1.5 - CUTOFF_INCREMENT
    assert [news.incumbent for news in told] == [3.0, 2.0]
    assert [news.bound for news in told] == [result.bound] * 2


def test_the_end_of_a_program_is_news_with_its_value():
    told = []
    results = solve_milps([model()] * 2, time_limit=60, threads=1, on_news=told.append)
    last = [news for news in told if news.ended]
    assert [news.index for news in last] == [0, 1]
    assert [news.incumbent for news in last] == pytest.approx([2.0, 2.0])
    assert [news.bound for news in last] == [result.bound for result in results]


def test_no_bound_exceeds_an_optimum_that_cbc_passed_over(rng):
    """CBC starts 2e-6 to 9e-6 above the optimum: too little for it to look on."""
    models, optima = [], []
    while len(models) < 4:
        load = rng.integers(10**6, 3 * 10**6, 12) / 12e6
        builder = MilpBuilder()
        x = builder.add_columns(12, upper=1.0, integer=True)
        d = builder.add_columns(1, objective=1.0)
        builder.fix(x[0], 1.0)
        builder.add_row(x, lower=6.0, upper=6.0)
        for sign in (1.0, -1.0):
            half = sign * load.sum() / 2
            builder.add_row([*x, d[0]], [*(sign * load), -1.0], upper=half)
        halves = np.array([(0, *c) for c in itertools.combinations(range(1, 12), 5)])
        values = np.abs(load[halves].sum(axis=1) - load.sum() / 2)
        above = values - values.min()
        if values.min() < 1e-5 or not ((above > 2e-6) & (above < 9e-6)).any():
            continue
        start = np.zeros(13)
        start[halves[np.flatnonzero((above > 2e-6) & (above < 9e-6))[0]]] = 1.0
        models.append(builder.build(start))
        optima.append(values.min())
    results = solve_milps(models, time_limit=30)
    for result, optimum in zip(results, optima, strict=True):
        assert result.status is SolveStatus.OPTIMAL
        assert result.bound <= optimum + 1e-9
