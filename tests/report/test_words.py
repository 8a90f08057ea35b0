"""Figures are written alike wherever they are shown."""

import dataclasses
import json
import re
from dataclasses import replace

import numpy as np
import pytest
from moetuner.evaluation.cost import CostModel, Wire
from moetuner.evaluation.evaluate import GainInterval
from moetuner.placement.topology import Topology
from moetuner.planning.baselines import Rival
from moetuner.planning.comparison import compare_placements
from moetuner.planning.options import PlanOptions
from moetuner.planning.plan import plan_trace
from moetuner.report.changes import changes_in
from moetuner.report.html import render_page
from moetuner.report.json import comparison_json
from moetuner.report.terminal import print_comparison
from moetuner.report.verdict import verdict
from moetuner.report.words import gain_cell, gap, number, percent, size
from moetuner.solver import SolverOptions
from moetuner.solver.joint.config import JointConfig
from moetuner.trace import CountTrace
from strategies import make_trace, random_ids

MACHINE = Topology(num_ranks=4, ranks_per_node=2)


@pytest.fixture
def trace(rng):
    sequence = (np.arange(600) // 20).astype(np.int32)
    return make_trace(random_ids(rng, 600, 3, 16, 2), 16, sequence=sequence)


def joint(**fields):
    own = {"solver_options": SolverOptions(time_limit=1, threads=1), **fields}
    return PlanOptions(solver="joint", **own)


@pytest.mark.parametrize(
    ("share", "shown"),
    [
        (0.0412, "+4.1%"),
        (-0.0412, "-4.1%"),
        (0.0, "0.0%"),
        (-0.0, "0.0%"),
        (-0.0004, "0.0%"),
        (0.0004, "0.0%"),
        (-0.0006, "-0.1%"),
    ],
)
def test_what_rounds_to_nothing_has_no_sign(share, shown):
    assert percent(share) == shown


def test_scores_bytes_and_gaps():
    assert [number(v) for v in (1.5, 4.35, 12345.6, np.nan)] == [
        "1.500",
        "4.350",
        "12346",
        "unknown",
    ]
    assert [size(v) for v in (999, 33e9, 4e15)] == ["999 B", "33 GB", "4,000 TB"]
    assert (gap(2.0, 1.5), gap(2.0, None), gap(None, 1.0)) == ("25.00%", "-", "-")
    tiny = GainInterval(gain=0.0, low=-1e-5, high=1e-5, confidence=0.95)
    assert gain_cell(tiny) == "0.0% [0.0%, 0.0%]"
    assert gain_cell(None) == "-"


def test_terminal_json_and_page_agree(trace, capsys):
    report = plan_trace(trace, MACHINE, joint(batch_tokens=100, prove_seconds=0.5))
    print_comparison(report)
    shown = capsys.readouterr().out
    page, value = render_page(report), comparison_json(report)
    (row,) = (each for each in value["placements"] if each["name"] == "joint")
    assert row["gap"] is not None
    # What is proven last is what a placement's file tells, and so a later report.
    assert report.result.placement.provenance.lower_bound == row["lower_bound"]
    for place in (shown, page):
        assert gap(row["value"], row["lower_bound"]) in place
        assert f"{row['lower_bound']:.5g}" in place
        assert verdict(report) in place.replace("\n", " ")
        for each in value["placements"]:
            assert number(each["batch_seconds_mean"] * 1e3) in place
            assert number(each["imbalance_mean"]) in place
        for candidate in report.candidates:
            assert gain_cell(candidate.gain) in place
    assert value["verdict"] == verdict(report)
    parts = [row[f"batch_{part}_seconds"] for part in ("compute", "dispatch")]
    assert 0 < sum(parts) < row["batch_seconds_mean"]
    assert not re.search(r"[+-]0\.0%", shown + page + json.dumps(value))


def test_gains_and_moves_count_from_what_is_in_use(trace):
    used = plan_trace(trace, MACHINE, joint(plan_fraction=0.4)).result.placement
    config = JointConfig(stay=used)
    report = plan_trace(trace, MACHINE, joint(config=config))
    assert [c.name for c in report.candidates[:2]] == ["in use", "contiguous"]
    assert report.baseline.placement is used
    moved = changes_in(report)
    assert 0 < moved.num_moved < 48
    text = verdict(report)
    assert f"From the placement in use, {moved.num_moved} of 48 experts" in text
    assert f"{size(moved.bytes_moved)} in all" in text
    told = comparison_json(report)["moves"]
    assert (told["from"], told["experts_moved"]) == ("in use", moved.num_moved)
    assert told["bytes"] == moved.bytes_moved
    assert f"{moved.num_moved} of 48" in render_page(report)
    # It was planned on another part of the same recording: it may have seen these.
    assert "the placement in use was planned on" in text


def test_what_is_in_use_is_a_baseline_to_beat(trace):
    used = plan_trace(trace, MACHINE, joint(plan_fraction=1.0)).result.placement
    config = JointConfig(stay=used, move_seconds=1.0)  # nothing is worth that
    report = plan_trace(trace, MACHINE, joint(config=config))
    assert report.rival.name == "in use"
    text = verdict(report)
    assert "the best baseline, the placement in use" in text
    assert text.startswith("Keep the placement in use: no change that was found")
    assert "less" not in text
    assert "MORE" not in text


def test_a_baseline_that_counts_no_moves_is_no_verdict_on_a_plan_that_does(trace):
    """Whether some experts move, or none: what is in use is not WORSE than itself."""
    used = plan_trace(trace, MACHINE, PlanOptions(solver="random")).result.placement
    for move_seconds in (1.0, 1e-7):
        config = JointConfig(stay=used, move_seconds=move_seconds)
        report = plan_trace(trace, MACHINE, joint(config=config))
        worse = GainInterval(gain=-0.1, low=-0.2, high=-0.05, confidence=0.95)
        report = replace(report, rival=Rival(name="chain", gain=worse))
        text = verdict(report)
        stays = move_seconds == 1.0
        assert text.startswith("Keep the placement in use") == stays
        assert "takes 10.0% MORE than with the best baseline, chain" in text
        assert "But chain counts no moves." in text
        assert "WORSE" not in text
        assert "Do not use it" not in text
        assert "Nothing moves" not in text
        page = render_page(report)
        assert ('class="verdict even"' in page) == stays
        assert 'class="verdict bad"' not in page


def test_a_plan_that_is_slower_than_what_is_in_use_has_no_excuse(trace):
    """A baseline that is faster than both counts no moves, but nor is it asked."""
    used = plan_trace(trace, MACHINE, PlanOptions(solver="random")).result.placement
    config = JointConfig(stay=used, move_seconds=1e-7)
    report = plan_trace(trace, MACHINE, joint(config=config))
    worse = GainInterval(gain=-0.1, low=-0.2, high=-0.05, confidence=0.95)
    lost = replace(report.result, gain=worse)
    others = [each for each in report.candidates if each is not report.result]
    report = replace(
        report,
        candidates=(*others, lost),
        result=lost,
        rival=Rival(name="chain", gain=worse),
    )
    text = verdict(report)
    assert "joint is WORSE than the best baseline, chain" in text
    assert "Do not use it" in text
    assert "counts no moves" not in text
    assert 'class="verdict bad"' in render_page(report)


def test_a_file_that_is_in_use_is_a_baseline_to_beat_too(trace):
    plans = {
        name: plan_trace(trace, MACHINE, PlanOptions(solver=solver)).result.placement
        for name, solver in (("new", "random"), ("old", "lpt"))
    }
    blind = {
        name: dataclasses.replace(
            each, provenance=dataclasses.replace(each.provenance, trace_sha256="")
        )
        for name, each in plans.items()
    }
    report = compare_placements(trace, blind, CostModel(), before="old")
    assert report.rival.name == "old"  # contiguous and random alone stand beside it
    assert "From old, " in verdict(report)


def test_choices_are_not_called_tokens(capsys, rng):
    counts = rng.integers(1, 50, (6, 2, 16))
    trace = CountTrace(
        counts=counts,
        num_tokens=counts.sum(axis=2).max(axis=1),
        layer_ids=np.arange(2, dtype=np.int32),
        tokens_known=False,
    )
    options = PlanOptions(solver="lpt", cost=CostModel(wire=Wire.ALLGATHER))
    report = plan_trace(trace, MACHINE, options)
    print_comparison(report)
    shown = capsys.readouterr().out
    assert f"planned on {report.plan_tokens:,} choices of experts a layer" in shown
    assert f"{report.score_tokens:,} choices of experts a layer" in render_page(report)
