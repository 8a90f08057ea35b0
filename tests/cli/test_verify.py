"""`moetuner verify`: equal is 0, different is 1 with what and where, unusable is 2."""

import json
import subprocess
import sys

import numpy as np
import pytest
from counted_run import count, make_run, record_of
from moetuner.evaluation.verify import write_record
from moetuner.placement.file import write_placement
from moetuner.placement.topology import Topology
from moetuner.trace import write_trace
from strategies import random_placement


@pytest.fixture
def run(tmp_path, rng):
    """Files of a run, and its record."""
    trace = make_run(rng, 2)
    placement = random_placement(
        rng, trace, Topology(num_ranks=2, ranks_per_node=2), extra_slots=1
    )
    paths = [tmp_path / n for n in ("run.safetensors", "plan.json", "counters")]
    write_trace(trace, paths[0])
    write_placement(placement, paths[1])
    record = record_of(count(trace, placement), placement)
    write_record(record, paths[2])
    return paths, record, placement


def test_equal_counters_are_said_to_be(folder, run):
    paths, record, _ = run
    result = folder.run("verify", *paths)
    assert result.exit_code == 0
    assert f"equal: all {record.counts.size} counters of 2 layers" in " ".join(
        result.stdout.split()
    )
    told = json.loads(folder.run("verify", *paths, "--json").stdout)
    assert told == {"equal": True, "numbers": record.counts.size, "different": []}


def test_a_different_counter_is_an_error_that_names_it(folder, run):
    paths, record, placement = run
    counts = record.counts.copy()
    counts[1, 0, 1] += 1
    write_record(record_of(counts, placement), paths[2])
    result = folder.run("verify", *paths)
    assert result.exit_code == 1
    assert "layer 1, rank 0: rows to rank 0: predicted" in result.stdout
    assert "1 of" in result.stderr
    told = folder.run("verify", *paths, "--json")
    assert told.exit_code == 1
    (difference,) = json.loads(told.stdout)["different"]
    assert difference["counted"] == difference["predicted"] + 1


def test_files_of_another_run_are_refused(folder, run, tmp_path):
    paths, record, placement = run
    other = record_of(record.counts, placement)
    object.__setattr__(other, "placement_fingerprint", "0" * 64)
    write_record(other, paths[2])
    result = folder.run("verify", *paths)
    assert result.exit_code == 2
    assert "another placement" in result.stderr
    np.savez(tmp_path / "x.npz", counts=np.ones((1, 2, 9), int))
    assert folder.run("verify", paths[0], paths[1], paths[0]).exit_code == 2


def test_it_imports_no_torch(run):
    code = (
        "import sys; from moetuner.cli import app\n"
        "try: app(sys.argv[1:])\n"
        "except SystemExit as end: assert not end.code, end.code\n"
        "assert 'torch' not in sys.modules"
    )
    arguments = ["verify", *map(str, run[0])]
    subprocess.run([sys.executable, "-c", code, *arguments], check=True)


def predicted(folder, paths, tmp_path):
    """Seconds of each part of all layers, as the command predicts them."""
    times = tmp_path / "times.csv"
    times.write_text("part,seconds\ndispatch,1\nexperts,1\ncombine,1\n")
    told = json.loads(
        folder.run("verify", *paths[:2], "--times", times, "--json").stdout
    )
    return {one["part"]: one["predicted_seconds"] for one in told["times"]}


def test_times_as_predicted_are_said_to_be(folder, run, tmp_path):
    paths, _, _ = run
    seconds = predicted(folder, paths, tmp_path)
    times = tmp_path / "times.csv"
    lines = [f"{part},{value!r}" for part, value in seconds.items()]
    times.write_text("part,seconds\n" + "\n".join(lines))
    result = folder.run("verify", *paths, "--times", times)  # and the counters
    assert result.exit_code == 0, result.stderr
    assert "equal: all" in result.stdout
    assert "every time is within 15% of the prediction" in result.stdout
    told = json.loads(folder.run("verify", *paths, "--times", times, "--json").stdout)
    assert told["equal"]
    assert [one["within"] for one in told["times"]] == [True] * 4


def test_the_part_that_is_off_is_named(folder, run, tmp_path):
    paths, _, _ = run
    seconds = predicted(folder, paths, tmp_path)
    seconds["experts"] += 2 * seconds.pop("total")
    times = tmp_path / "times.csv"
    lines = [f"{part},{1e3 * value!r}" for part, value in seconds.items()]
    times.write_text("part,ms\n" + "\n".join(lines))
    result = folder.run("verify", *paths[:2], "--times", times)
    assert result.exit_code == 1
    assert "2 of 4 times are not within 15%" in result.stderr
    assert "most is in experts" in result.stderr
    assert "more than predicted" in result.stderr
    wide = folder.run("verify", *paths[:2], "--times", times, "--within", 20)
    assert wide.exit_code == 0


def test_a_machine_changes_the_prediction_of_times(folder, run, tmp_path):
    paths, _, _ = run
    times = tmp_path / "times.csv"
    times.write_text("part,seconds\nexperts,1\n")
    seconds = []
    for name in ("h100", "h200"):
        result = folder.run(
            *("verify", *paths[:2], "--times", times, "--hardware", name, "--json"),
        )
        told = json.loads(result.stdout)["times"]
        seconds.append(told[0]["predicted_seconds"])
    assert seconds[1] < seconds[0]


def test_nothing_to_compare_is_an_error(folder, run):
    paths, _, _ = run
    result = folder.run("verify", *paths[:2])
    assert result.exit_code == 2
    assert "--times" in result.stderr
