"""The program that scores calibrated predictions: its scores, and a run of it."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("torch", reason="torch is not installed")

FOLDER = Path(__file__).parents[2] / "benchmarks"
sys.path.insert(0, str(FOLDER / "planning"))
from calibrated import summary  # noqa: E402


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
    }


def test_a_gain_that_cannot_be_told_from_the_spread_is_no_loss():
    found = summary(
        [cell("a", "x", 1.0, 1.1, spread=0.5), cell("a", "y", 1.2, 1.0, spread=0.5)]
    )
    assert found["predicted_gains"] == 1
    assert found["gains_that_were_losses"] == found["pairs_beyond_spread"] == 0


@pytest.mark.slow
def test_it_runs_on_two_ranks(tmp_path):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command += ["--nproc-per-node", "2", str(FOLDER / "planning" / "calibrated.py")]
    command += ["--device", "cpu", "--seconds", "1", "--models", "mixtral"]
    command += ["--layers", "1", "--cell-seconds", "0.05", "--plan-seconds", "0.2"]
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
    assert told["cells"] == 16  # two sizes of each phase, four placements
    if "the machine was busy" in done.stdout:
        assert not list(tmp_path.iterdir())
    else:
        assert json.loads((tmp_path / "x.json").read_text())["summary"] == told
        assert "Fitted times, exact form" in (tmp_path / "x.md").read_text()
