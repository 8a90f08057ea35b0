"""The program that scores calibrated predictions: its scores, and a run of it."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from moetuner.calibration.samples import Form

pytest.importorskip("torch", reason="torch is not installed")

FOLDER = Path(__file__).parents[2] / "benchmarks"
sys.path.insert(0, str(FOLDER / "planning"))
from calibrated_cells import PLACEMENTS, cells_of  # noqa: E402
from calibrated_scores import beside_baselines, page, summary  # noqa: E402


def cell(model, placement, measured, told, spread=0.0):
    return {
        "model": model,
        "form": "exact",
        "tokens_per_rank": 8,
        "placement": placement,
        "measured": {"total": measured},
        "predicted": {"total": told},
        "spread": spread,
    }


def test_errors_ranks_and_losses_are_counted():
    found = summary(
        [
            cell("a", "x", 1.0, 1.1),
            cell("a", "y", 2.0, 1.0),  # predicted faster by 9 %, measured slower
            cell("a", "z", 2.1, 1.0, spread=0.3),  # no other than y, but slower than x
            cell("b", "x", 9.0, 9.0),  # of another model: no pair
        ]
    )
    assert found == {
        "cells": 4,
        "median_error": pytest.approx(0.3),
        "worst_error": pytest.approx(1.1 / 2.1),
        "within_15_percent": 0.5,
        "pairs_beyond_spread": 2,
        "ranked_right": 0,
        "predicted_gains": 2,
        "gains_that_were_losses": 2,
        "plans": 0,
        "plans_faster_beyond_spread": 0,
        "plans_slower_beyond_spread": 0,
    }


def test_a_gain_that_cannot_be_told_from_the_spread_is_no_loss():
    found = summary(
        [cell("a", "x", 1.0, 1.1, spread=0.5), cell("a", "y", 1.2, 1.0, spread=0.5)]
    )
    assert found["predicted_gains"] == 1
    assert found["gains_that_were_losses"] == found["pairs_beyond_spread"] == 0


def test_a_plan_is_beside_the_fastest_baseline_with_as_many_slots():
    plain, spare = beside_baselines(
        [
            cell("a", "lpt", 1.0, 1.0),
            cell("a", "random", 1.2, 1.1),
            cell("a", "eplb+replica", 0.9, 0.9),
            cell("a", "joint", 0.95, 0.98),
            cell("a", "joint+replica", 1.0, 0.8, spread=0.05),
            cell("b", "joint", 9.0, 9.0),  # no baseline of its model
        ]
    )
    assert plain["best_baseline"] == "lpt"
    assert plain["measured_gain"] == pytest.approx(0.05)
    assert plain["predicted_gain"] == pytest.approx(0.02)
    assert plain["certain"] == 1
    assert (spare["best_baseline"], spare["certain"]) == ("eplb+replica", -1)


def test_the_page_has_every_cell_and_every_plan():
    cells = [cell("a", name, 1.0, 1.0) | {"replayed": False} for name in PLACEMENTS]
    lines = page({"cpu": "made up"}, {}, cells, summary(cells))
    tables = [line for line in lines if line.startswith("| a |")]
    assert len(tables) == len(PLACEMENTS) + 2
    assert tables[0] == (
        "| a | exact | 8 | joint | contiguous | +0.0% | +0.0% | within the spread |"
    )


@pytest.mark.parametrize("form", list(Form))
def test_what_is_measured_was_not_planned_on_but_is_of_the_same_model(form):
    (cell,) = cells_of("cpu", ["mixtral"], 2, {f: [32] * (f is form) for f in Form})
    whole, planned = cell._split(4)[1], cell.planned_trace(4)
    batches = cell.batches(4, 3)
    assert [batch.num_tokens for batch in batches] == [128] * 3
    assert [np.bincount(b.home_rank).tolist() for b in batches] == [[32] * 4] * 3
    if form is Form.EXACT:
        rows = np.concatenate([batch.topk_ids for batch in batches])
        assert (rows == whole.topk_ids[: len(rows)]).all()
    load = [
        np.bincount(t.topk_ids.ravel(), minlength=8) / t.topk_ids.size
        for t in (planned, whole)
    ]
    assert np.abs(load[0] - load[1]).max() < 0.01  # another model: 0.027


@pytest.mark.slow
def test_it_runs_on_two_ranks(tmp_path):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command += ["--nproc-per-node", "2", str(FOLDER / "planning" / "calibrated.py")]
    command += ["--device", "cpu", "--seconds", "1", "--models", "mixtral"]
    command += ["--layers", "1", "--cell-seconds", "0.05", "--plan-seconds", "0.2"]
    command += ["--prefill", "64", "--decode", "8", "--batches", "1", "--jobs", "2"]
    done = subprocess.run(
        [*command, "--out", str(tmp_path / "x.json")],
        env=os.environ | {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=280,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    told = json.loads(re.search(r"^\{.*^\}", done.stdout, re.DOTALL | re.MULTILINE)[0])
    assert told["cells"] == 2 * len(PLACEMENTS)
    assert told["plans"] == 4
    if "the machine was busy" in done.stdout:
        assert not list(tmp_path.iterdir())
    else:
        assert json.loads((tmp_path / "x.json").read_text())["summary"] == told
        assert "Fitted times, exact form" in (tmp_path / "x.md").read_text()
