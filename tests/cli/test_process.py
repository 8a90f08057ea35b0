"""What only a real process shows: signals, pipes, terminals, two ways to start."""

import json
import os
import pty
import shlex
import signal
import subprocess
import sys
import sysconfig
import threading
import time
from pathlib import Path

import numpy as np
import pytest
from moetuner.placement.file import read_placement
from strategies import random_ids

MOETUNER = [sys.executable, "-m", "moetuner"]
SCRIPT = Path(sysconfig.get_path("scripts")) / "moetuner"


@pytest.fixture
def hard(folder, rng):
    """A trace that keeps CBC busy for more than the limits used here."""
    return folder.trace(random_ids(rng, 3000, 12, 64, 4), 64)


def plan_command(trace, out, *arguments, seconds=30, solver="ilp1"):
    return [
        *(*MOETUNER, "plan", str(trace), "--ranks", "8", "--solver", solver),
        *("--time-limit", str(seconds), "--threads", "2", "--out", str(out)),
        *arguments,
    ]


def start(command, **options):
    return subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, **options
    )


def children_of(pid):
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = stat.read_text().rpartition(")")[2].split()
        except OSError:
            continue
        if int(fields[1]) == pid:
            found.append(int(stat.parent.name))
    return found


def wait_for_children(process, count=2):
    deadline = time.monotonic() + 20
    while len(workers := children_of(process.pid)) < count:
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.05)
    return workers


def gone(pid):
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return True
    return stat.rpartition(")")[2].split()[0] == "Z"


def test_both_ways_to_start_agree():
    outputs = [
        subprocess.run([*start, "--version"], capture_output=True, text=True)
        for start in (MOETUNER, [str(SCRIPT)])
    ]
    assert outputs[0].stdout == outputs[1].stdout
    assert outputs[0].stdout.startswith("moetuner ")


@pytest.mark.parametrize("solver", ["ilp1", "ilp2"])
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_signal_keeps_the_best_placement(folder, hard, number, solver):
    process = start(plan_command(hard, folder.out, "--json", solver=solver))
    workers = wait_for_children(process)
    time.sleep(0.3)
    began = time.monotonic()
    process.send_signal(number)
    output, errors = process.communicate(timeout=20)
    assert time.monotonic() - began < 10  # not the 30 s that it was given
    assert process.returncode == 0, errors
    assert "note: interrupted" in errors
    assert "Traceback" not in errors
    result = json.loads(output)["placements"][-1]
    assert result["status"] == "interrupted"
    content = json.loads(folder.out.read_text())
    assert content["provenance"]["status"] == "interrupted"
    assert all(gone(worker) for worker in workers)


@pytest.mark.parametrize("homes", ["uniform", "follow"])
def test_ctrl_c_keeps_what_the_joint_search_has(folder, rng, homes):
    trace = folder.trace(random_ids(rng, 3000, 12, 64, 4), 64, ranked=True)
    process = start(
        plan_command(
            *(trace, folder.out, "--json", "--homes", homes, "--prove", "0"),
            solver="joint",
        )
    )
    line = process.stderr.readline()  # the model is unknown: said before the solve
    assert "not in the table" in line
    time.sleep(4)
    process.send_signal(signal.SIGINT)
    output, errors = process.communicate(timeout=20)
    assert process.returncode == 0, errors
    assert "note: interrupted" in errors
    assert json.loads(output)["placements"][-1]["status"] == "interrupted"
    assert read_placement(folder.out).provenance.status == "interrupted"


def test_signal_reaches_a_job_that_a_shell_put_in_the_background(folder, hard):
    process = start(
        plan_command(hard, folder.out),
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_IGN),
    )
    wait_for_children(process)
    process.send_signal(signal.SIGINT)
    process.communicate(timeout=20)
    assert process.returncode == 0
    assert folder.out.exists()


def test_no_solver_outlives_a_killed_process(folder, hard):
    process = start(plan_command(hard, folder.out, seconds=60))
    workers = wait_for_children(process)
    time.sleep(1)  # CBC is at work
    process.kill()
    process.communicate(timeout=20)
    deadline = time.monotonic() + 5
    while not all(gone(worker) for worker in workers):
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_signal_while_reading_saves_nothing(folder):
    fifo = folder.path / "never"
    os.mkfifo(fifo)
    process = start([*MOETUNER, "describe", str(fifo)])
    # The other end opens only once the process reads: by then it can be interrupted.
    writer = os.open(fifo, os.O_WRONLY)
    time.sleep(0.1)
    process.send_signal(signal.SIGINT)
    output, errors = process.communicate(timeout=20)
    os.close(writer)
    assert process.returncode == 130
    assert errors == "error: interrupted, nothing was written\n"
    assert output == ""


def test_closed_pipe_is_no_error_message(folder, ids):
    command = plan_command(folder.trace(ids), folder.out, "--quiet", solver="lpt")
    process = start(command)
    process.stdout.close()  # nobody reads, as after `| head -0`
    with process.stderr as errors:
        assert errors.read() == ""
    process.wait(timeout=20)
    assert folder.out.exists()


@pytest.mark.parametrize("closed", [">&-", "2>&-", "<&- >&- 2>&-"])
def test_streams_that_the_shell_closed_cost_only_what_they_would_have_said(
    folder, ids, closed
):
    command = plan_command(folder.trace(ids), folder.out, solver="ilp1", seconds=1)
    result = subprocess.run(
        f"{shlex.join(command)} {closed}", shell=True, capture_output=True, text=True
    )
    assert result.returncode == 0, result.stderr
    assert "Traceback" not in result.stderr
    assert read_placement(folder.out).topology.num_ranks == 8


def test_output_that_cannot_be_encoded_is_escaped(folder, ids):
    from moetuner.trace import TraceMetadata

    trace = folder.trace(ids, metadata=TraceMetadata(model="modèle-專家"))
    result = subprocess.run(
        [*MOETUNER, "describe", str(trace)],
        capture_output=True,
        env=os.environ | {"PYTHONIOENCODING": "ascii"},
    )
    assert result.returncode == 0
    assert b"mod\\xe8le" in result.stdout


def test_progress_without_a_terminal_is_plain_lines(folder, hard):
    process = start(plan_command(hard, folder.out, seconds=2))
    output, errors = process.communicate(timeout=30)
    lines = [line for line in errors.splitlines() if line.startswith("ilp1 ")]
    assert lines
    assert all("incumbent" in line and "gap" in line for line in lines)
    assert "\x1b" not in errors + output
    assert "\r" not in errors + output


def run_in_terminal(command, columns):
    """Output of `command` on a terminal of 24 lines and `columns`."""
    main, other = pty.openpty()
    environment = os.environ | {"TERM": "xterm", "COLUMNS": str(columns), "LINES": "24"}
    process = subprocess.Popen(
        command, stdin=other, stdout=other, stderr=other, env=environment
    )
    os.close(other)
    chunks = []

    def read():
        try:
            while chunk := os.read(main, 65536):
                chunks.append(chunk)
        except OSError:
            pass  # the last writer is gone

    reader = threading.Thread(target=read)
    reader.start()
    assert process.wait(timeout=30) == 0
    reader.join()
    os.close(main)
    return b"".join(chunks).decode()


def test_terminal_shows_progress_and_a_table_of_its_width(folder, hard):
    shown = run_in_terminal(plan_command(hard, folder.out, seconds=2), columns=80)
    for text in ("incumbent", "bound", "gap"):
        assert text in shown
    rows = [line for line in shown.splitlines() if line.startswith("contiguous")]
    assert len(rows) == 2  # scores and batches
    table = shown[shown.index("Scores on held-out") :].splitlines()
    end = next(i for i, line in enumerate(table) if line.startswith("load: "))
    assert max(len(line.split("\x1b")[0]) for line in table[:end]) <= 80
    assert np.count_nonzero([line.startswith("ilp1") for line in shown.splitlines()])
