"""`moetuner drift`: its exit codes are for scripts."""

import json
import signal

import numpy as np
import pytest
from moetuner.placement.file import read_placement
from moetuner.placement.moves import fetched_replicas
from strategies import random_ids
from test_process import LONG, MOETUNER, WAIT, start, wait_for_solver

REPLAN = 3


@pytest.fixture
def in_use(folder, ids):
    """Planned for yesterday's tokens; today all choose experts of the first rank.

    Whatever a search finds, to spread these four over four ranks is much faster.
    """
    assert folder.plan(folder.trace(ids)).exit_code == 0
    busy = read_placement(folder.out).slot_experts[:, :4]
    today = np.empty((600, 3, 2), np.int16)
    first = np.arange(600) % 4
    for layer, experts in enumerate(busy):
        today[:, layer, 0] = experts[first]
        today[:, layer, 1] = experts[(first + 1) % 4]
    return folder.out, folder.trace(today, name="today.safetensors")


def drift(folder, *arguments):
    more = ("--time-limit", 0.5, "--threads", 1, "--batch-tokens", 40)
    return folder.run("drift", *arguments, *more)


def test_code_3_says_that_re_planning_pays_and_0_that_it_does_not(folder, in_use):
    pays = drift(folder, *in_use, "--threshold", 0)
    assert pays.exit_code == REPLAN, pays.stderr
    assert "Re-plan: a new plan saves" in pays.stdout
    keeps = drift(folder, *in_use, "--threshold", 0.9)
    assert keeps.exit_code == 0, keeps.stderr
    assert "Keep the plan in use" in keeps.stdout


def test_json_tells_all_and_the_new_plan_is_written(folder, in_use):
    new = folder.path / "new.json"
    old = folder.path / "trace.safetensors"
    result = drift(
        *(folder, *in_use, "--threshold", 0, "--out", new, "--recording", old),
        *("--json", "--quiet", "--hidden-size", 4096, "--expert-hidden-size", 2048),
    )
    assert result.exit_code == REPLAN
    said = [
        each for each in result.stderr.splitlines() if "assuming hidden" not in each
    ]
    assert said == []
    found = json.loads(result.stdout)
    assert found["replan"]
    assert found["gain"]["low"] > 0
    moved = fetched_replicas(read_placement(in_use[0]), read_placement(new)).size
    assert found["moves"]["replicas"] == moved > 0
    assert found["before"]["held_out"]
    times = {each["name"]: each["batch_seconds_mean"] for each in found["placements"]}
    assert found["saved_seconds"] == times["in use"] - times["new plan"]
    assert found["steps_to_pay"] == pytest.approx(
        found["moves"]["seconds"] / found["saved_seconds"], abs=1
    )


def test_its_own_recording_is_named_as_such(folder, in_use):
    result = drift(folder, in_use[0], folder.path / "trace.safetensors")
    assert "was planned on this recording: no drift is to be seen" in result.stderr


@pytest.mark.parametrize(
    ("option", "value", "same"), [("--split", "0.4", "0.5"), ("--seed", "3", "0")]
)
def test_on_its_own_recording_another_part_is_refused(
    folder, in_use, option, value, same
):
    """It would score tokens that the plan in use was planned on."""
    old, _ = in_use
    own = (old, folder.path / "trace.safetensors")
    refused = drift(folder, *own, option, value)
    assert refused.exit_code == 2
    said = " ".join(refused.stderr.split())
    assert f"was planned on this recording, with {option} {same}" in said
    assert drift(folder, *own, option, same).exit_code == 0
    assert drift(folder, *in_use, option, value).exit_code in (0, 3)


def test_every_line_fits_a_terminal_of_80_columns(folder, in_use):
    shown = drift(folder, *in_use).stdout.splitlines()
    table = shown[next(i for i, line in enumerate(shown) if "placement " in line) :]
    rows = [line.rstrip() for line in table if line.startswith(("in use", "new plan "))]
    assert len(rows) == 2
    assert max(map(len, rows)) <= 80


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("--threshold", 1), "--threshold must be in [0, 1), got 1.0"),
        (("--steps", 0), "--steps"),
        (("--split", 0), "--split must be in"),
        (("--time-limit", 0), "--time-limit must be > 0"),
        (("--recording", "today.safetensors"), "not planned on the given recording"),
        (("--out", "today.safetensors"), "that is an input"),
    ],
)
def test_bad_input_is_code_2_and_named(folder, in_use, arguments, said):
    option, value = arguments
    if isinstance(value, str):
        value = folder.path / value
    result = folder.run("drift", *in_use, option, value)
    assert result.exit_code == 2
    assert said in result.stderr


def test_another_model_is_named_with_both_files(folder, ids, in_use):
    two_layers = folder.trace(ids[:, :2].copy(), name="two.safetensors")
    more_experts = folder.trace(ids, 32, name="more.safetensors")
    for trace, wanted in ((two_layers, "has 16 and [0, 1]"), (more_experts, "has 32")):
        result = drift(folder, in_use[0], trace)
        assert result.exit_code == 2
        assert f"{in_use[0]} and {trace}: placement is for another" in result.stderr
        assert wanted in result.stderr


def test_a_trace_where_the_placement_should_be_is_refused(folder, in_use):
    result = drift(folder, in_use[1], in_use[0])
    assert result.exit_code == 2
    assert "not JSON" in result.stderr


def test_counts_drift_too(folder, ids, in_use):
    load = np.stack([np.bincount(ids[:, i].ravel(), minlength=16) for i in range(3)])
    counts = np.stack([load, load, load, load])
    np.savez(folder.path / "counts.npz", counts=counts)
    result = drift(folder, in_use[0], folder.path / "counts.npz", "--top-k", 2)
    assert result.exit_code in (0, REPLAN), result.stderr
    assert "scored with --wire allgather" in result.stderr


def test_ctrl_c_judges_the_best_plan_found_so_far(folder, in_use, rng):
    trace = folder.trace(random_ids(rng, 3000, 12, 64, 4), 64, name="large")
    assert folder.plan(trace, ranks=8).exit_code == 0
    process = start(
        [
            *(*MOETUNER, "drift", str(folder.out), str(trace), "--json"),
            *("--time-limit", str(LONG), "--threads", "2"),
        ]
    )
    wait_for_solver(process)
    process.send_signal(signal.SIGINT)
    output, errors = process.communicate(timeout=WAIT)
    assert process.returncode in (0, REPLAN), errors
    found = json.loads(output)
    assert process.returncode == (REPLAN if found["replan"] else 0)
    assert found["status"] == "interrupted"
    assert "note: interrupted" in errors
