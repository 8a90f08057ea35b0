import dataclasses
import io

import numpy as np
import pytest
from moetuner.planning.plan import demo_trace
from moetuner.report.table import (
    batch_table,
    description_table,
    evaluation_table,
    score_table,
    stage_table,
)
from moetuner.report.words import gain_cell, percent
from moetuner.trace.description import describe
from rich.console import Console


def render(table, width=80):
    stream = io.StringIO()
    Console(file=stream, width=width).print(table)
    return stream.getvalue().splitlines()


def test_score_table_shows_every_score_of_every_candidate(make_report):
    report = make_report()
    lines = render(score_table(report))
    for candidate in report.candidates:
        (row,) = (line for line in lines if line.startswith(candidate.name))
        scores = candidate.evaluation
        shown = row.split()
        assert shown[1:6] == [
            f"{score:.3f}"
            for score in (
                scores.imbalance_mean,
                scores.imbalance_worst,
                scores.remote_ranks_per_token,
                scores.remote_nodes_per_token,
                scores.bottleneck_receive,
            )
        ]
        assert shown[6] == f"{scores.batch_seconds_mean * 1e3:.3f}"
        gain = candidate.gain
        assert shown[7] == ("-" if gain is None else percent(gain.gain))
        assert row.endswith(gain_cell(gain))


def test_score_table_fits_80_columns_whatever_the_numbers(make_report):
    report = make_report()
    big = dataclasses.replace(
        report.result.evaluation, batch_seconds_mean=123.4567, imbalance_worst=12.345
    )
    gain = dataclasses.replace(report.result.gain, gain=-0.123, low=-0.234, high=0.124)
    worst = dataclasses.replace(report.result, evaluation=big, gain=gain)
    table = score_table(
        dataclasses.replace(
            report, candidates=(*report.candidates[:-1], worst), result=worst
        )
    )
    lines = render(table)
    assert max(map(len, lines)) <= 80
    (row,) = (line for line in lines if line.startswith(worst.name))
    assert row.split()[6] == "123457"  # milliseconds
    assert "-12.3% [-23.4%, +12.4%]" in row


@pytest.mark.parametrize("solver", ["lpt", "ilp2"])
def test_stage_table_states_value_bound_and_gap(make_report, solver):
    report = make_report(solver=solver)
    solution = report.result.solution
    table = stage_table(solver, solution)
    text = "\n".join(render(table, width=120))
    for claim in solution.stages or (solution,):
        assert f"{claim.value:.5g}" in text
        assert claim.status.value in text
        assert claim.gap is None or f"{claim.gap:.2%}" in text
    assert max(map(len, render(table))) <= 80


def test_evaluation_table_folds_long_names_and_keeps_numbers(make_report):
    report = make_report()
    name = "a/very/long/path/" * 8 + "placement.json"
    lines = render(evaluation_table([name], [report.result.evaluation]))
    assert max(map(len, lines)) <= 80
    assert f"{report.result.evaluation.imbalance_mean:.3f}" in "\n".join(lines)
    assert name in "".join(line.split(" ")[0] for line in lines)


def test_unknown_scores_are_called_so(make_report):
    scores = dataclasses.replace(
        make_report().result.evaluation, remote_ranks_per_token=float("nan")
    )
    assert "unknown" in "\n".join(render(evaluation_table(["x"], [scores])))


def test_description_table_fits_80_columns():
    lines = render(description_table(describe(demo_trace())))
    assert max(map(len, lines)) <= 80
    assert any("tokens" in line for line in lines)


def test_batch_table_shows_mean_and_tail_of_every_candidate(make_report):
    report = make_report(batch_tokens=100)
    names = [candidate.name for candidate in report.candidates]
    scores = [candidate.evaluation for candidate in report.candidates]
    lines = render(batch_table(names, scores))
    assert max(map(len, lines)) <= 80
    assert "Batches of about 100 tokens" in lines[0]
    for name, score in zip(names, scores, strict=True):
        (row,) = (line for line in lines if line.startswith(name))
        mean, tails = (
            score.batch_seconds_mean,
            np.percentile(score.batch_seconds, (95, 99)),
        )
        gain = 1 - mean / scores[0].batch_seconds_mean
        assert row.split()[1:] == [
            "5",
            *(f"{value * 1e3:.3f}" for value in (mean, *tails)),
            "-" if score is scores[0] else f"{gain:+.1%}",
        ]
    assert scores[0].batch_seconds_mean > scores[2].batch_seconds_mean


def test_one_batch_has_no_percentiles(make_report):
    scores = make_report(batch_tokens=0).result.evaluation
    row = render(batch_table(["x"], [scores]))[-1].split()
    assert row[1:] == ["1", f"{scores.batch_seconds_mean * 1e3:.3f}", "-", "-", "-"]
