"""What only a real process shows: signals, pipes, terminals, two ways to start.

Tests wait for what a process says or does. `LONG` is what a solve would take that did
not obey; nothing here waits as long as that.
"""

import json
import os
import re
import shlex
import signal
import subprocess
import sys
import sysconfig
import time
from pathlib import Path

import pytest
from moetuner.placement.file import read_placement
from strategies import random_ids
from terminal import MOETUNER, WAIT, run_in_terminal

SCRIPT = Path(sysconfig.get_path("scripts")) / "moetuner"
LONG = 1000  # seconds
PROGRESS = re.compile(r"\S.* \d+/\d+  incumbent ")


@pytest.fixture
def hard(folder, rng):
    """A trace that keeps CBC busy for longer than any test waits."""
    return folder.trace(random_ids(rng, 3000, 12, 64, 4), 64)


def plan_command(trace, out, *arguments, seconds=LONG, solver="ilp1"):
    return [
        *(*MOETUNER, "plan", str(trace), "--ranks", "8", "--solver", solver),
        *("--time-limit", str(seconds), "--threads", "2", "--out", str(out)),
        *("--baselines", "none", "--prove", "0"),
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


def wait_for_solver(process):
    """What the process said until its solver told of a first placement."""
    said = ""
    for line in process.stderr:
        said += line
        if PROGRESS.match(line):
            return said
    raise AssertionError(f"ended without progress: {said}")


def wait_until(holds):
    deadline = time.monotonic() + WAIT
    while not holds():
        assert time.monotonic() < deadline
        time.sleep(0.02)


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


@pytest.mark.parametrize(
    ("number", "solver"), [(signal.SIGINT, "ilp1"), (signal.SIGTERM, "ilp2")]
)
def test_signal_keeps_the_best_placement(folder, hard, number, solver):
    process = start(plan_command(hard, folder.out, "--json", solver=solver))
    wait_for_solver(process)
    wait_until(lambda: children_of(process.pid))
    workers = children_of(process.pid)
    process.send_signal(number)
    output, errors = process.communicate(timeout=WAIT)
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
            *(trace, folder.out, "--json", "--homes", homes),
            solver="joint",
        )
    )
    said = wait_for_solver(process)
    assert "not in the table" in said  # the model is unknown: said before the solve
    process.send_signal(signal.SIGINT)
    output, errors = process.communicate(timeout=WAIT)
    assert process.returncode == 0, errors
    assert "note: interrupted" in errors
    assert json.loads(output)["placements"][-1]["status"] == "interrupted"
    assert read_placement(folder.out).provenance.status == "interrupted"


def test_ctrl_c_waits_for_no_proof_and_no_slow_baseline(folder, hard):
    command = plan_command(hard, folder.out, "--json", solver="joint")
    more = ("--baselines", "all", "--prove", str(LONG))
    process = start([*command, *more])
    wait_for_solver(process)
    process.send_signal(signal.SIGINT)
    output, errors = process.communicate(timeout=WAIT)
    assert process.returncode == 0, errors
    heard, kept = errors.index("interrupted: stopping"), errors.index("note: inter")
    assert heard < kept
    found = json.loads(output)
    assert found["left_out"]["ilp2"] == "the plan was interrupted"
    assert "best baseline computed, " in found["verdict"]


@pytest.mark.parametrize(
    "setup",
    [
        # While the commands are loaded, and while arguments are read.
        "sys.modules['moetuner.cli'] = Stop('moetuner.cli')",
        "from typer.core import TyperGroup; TyperGroup.parse_args = stop",
    ],
)
def test_ctrl_c_before_a_command_runs_is_no_traceback(setup):
    program = f"""
import sys, types
def stop(*_):
    raise KeyboardInterrupt
class Stop(types.ModuleType):
    __getattr__ = stop
{setup}
from moetuner.__main__ import main
main()
"""
    done = subprocess.run([MOETUNER[0], "-c", program], capture_output=True, text=True)
    assert done.stderr == "error: interrupted, nothing was written\n"
    assert done.returncode == 130


def test_ctrl_c_while_a_dataclass_is_made_ends_by_the_exit_code(tmp_path):
    (tmp_path / "program.py").write_text(
        """
import sys, types
class Stop(types.ModuleType):
    def __getattr__(self, _):
        exec("raise KeyboardInterrupt")
sys.modules["moetuner.cli"] = Stop("moetuner.cli")
from moetuner.__main__ import main
main()
"""
    )
    command = [MOETUNER[0], "-m", "program"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.stderr == "error: interrupted, nothing was written\n"
    assert done.returncode == 130


def test_signal_reaches_a_job_that_a_shell_put_in_the_background(folder, hard):
    process = start(
        plan_command(hard, folder.out),
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_IGN),
    )
    wait_for_solver(process)
    process.send_signal(signal.SIGINT)
    process.communicate(timeout=WAIT)
    assert process.returncode == 0
    assert folder.out.exists()


def test_no_solver_outlives_a_killed_process(folder, hard):
    process = start(plan_command(hard, folder.out))
    wait_for_solver(process)
    wait_until(lambda: children_of(process.pid))
    workers = children_of(process.pid)
    process.kill()
    process.communicate(timeout=WAIT)
    wait_until(lambda: all(gone(worker) for worker in workers))


def test_signal_while_reading_saves_nothing(folder):
    fifo = folder.path / "never"
    os.mkfifo(fifo)
    process = start([*MOETUNER, "describe", str(fifo)])
    # The other end opens only once the process reads: by then it can be interrupted.
    writer = os.open(fifo, os.O_WRONLY)
    process.send_signal(signal.SIGINT)
    output, errors = process.communicate(timeout=WAIT)
    os.close(writer)
    assert process.returncode == 130
    heard = "\ninterrupted: stopping\n"
    assert errors == f"{heard}error: interrupted, nothing was written\n"
    assert output == ""


def test_what_does_not_obey_is_ended_and_what_was_kept_is_said(tmp_path):
    program = f"""
import signal, threading
from moetuner._files import atomic_path
from moetuner.cli import interrupts
with interrupts.obeyed():
    signal.signal(signal.SIGINT, lambda *_: None)
    interrupts.keep_in_mind("interrupted; plan.json holds the placement")
    with atomic_path({str(tmp_path / "half.json")!r}):
        print("at work", flush=True)
        threading.Event().wait()
"""
    process = start([MOETUNER[0], "-c", program])
    assert process.stdout.readline() == "at work\n"
    assert len(list(tmp_path.iterdir())) == 1  # not finished
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=WAIT)
    assert process.returncode == 130
    said = ["", "interrupted: stopping", "error: interrupted; plan.json holds the"]
    assert [line[: len(said[-1])] for line in errors.splitlines()] == said
    assert not list(tmp_path.iterdir())


LEAVES_A_CALL = """
import atexit, os, signal, sys, time
from moetuner.cli.interrupts import obeyed
from moetuner.solver.joint.interruptible import Interruptible
atexit.register(print, "Python ended by itself")
def call():
    time.sleep(0.3)  # until it is waited for
    os.kill(os.getpid(), signal.SIGINT)
    time.sleep(60)
with obeyed():
    assert Interruptible().in_time(call) is None
    print("kept")
    sys.exit(130)
"""


def test_a_program_ends_beside_a_call_that_was_given_up():
    """Its thread would come back to an interpreter that is no more, and abort."""
    done = subprocess.run(
        [sys.executable, "-c", LEAVES_A_CALL],
        capture_output=True,
        text=True,
        timeout=WAIT,
        check=False,
    )
    assert done.returncode == 130, done.stderr
    assert done.stdout == "kept\n"


def test_closed_pipe_is_no_error_message(folder, ids):
    command = plan_command(folder.trace(ids), folder.out, "--quiet", solver="lpt")
    process = start(command)
    process.stdout.close()  # nobody reads, as after `| head -0`
    with process.stderr as errors:
        said = errors.read()
    process.wait(timeout=WAIT)
    assert said.startswith("note: model 'unknown' is not in the table")
    assert said.count("\n") == 1
    assert folder.out.exists()


@pytest.mark.parametrize("closed", [">&-", "2>&-", "<&- >&- 2>&-"])
def test_streams_that_the_shell_closed_cost_only_what_they_would_have_said(
    folder, ids, closed
):
    command = plan_command(folder.trace(ids), folder.out, solver="ilp1")
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


def test_progress_without_a_terminal_is_plain_lines(folder, ids):
    process = start(plan_command(folder.trace(ids), folder.out))
    output, errors = process.communicate(timeout=WAIT)
    lines = [line for line in errors.splitlines() if line.startswith("ilp1 ")]
    assert lines
    assert all("incumbent" in line and "gap" in line for line in lines)
    assert "\x1b" not in errors + output
    assert "\r" not in errors + output


def test_terminal_shows_progress_and_a_table_of_its_width(folder, ids):
    command = plan_command(folder.trace(ids), folder.out)
    shown = run_in_terminal(command, columns=80)
    for text in ("incumbent", "bound", "gap"):
        assert text in shown
    lines = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", shown).splitlines()
    rows = [line for line in lines if re.match(r"contiguous +\d", line)]
    assert len(rows) == 2  # scores and batches
    begin = next(i for i, line in enumerate(lines) if "Scores on held-out" in line)
    end = next(i for i, line in enumerate(lines) if line.startswith("wrote "))
    assert max(map(len, lines[begin:end])) <= 80
    said = " ".join(" ".join(lines[begin:end]).split())
    assert "best baseline" in said  # the verdict, wrapped between words
    assert any(line.startswith("ilp1") for line in lines)


@pytest.mark.parametrize(
    ("command", "given", "expected"),
    [("plan", None, "1"), ("plan", "3", "3"), ("calibrate", None, "None")],
)
def test_matrix_products_get_one_thread_unless_somebody_says_otherwise(
    command, given, expected
):
    """OpenBLAS's threads spin on cores that the planner's own need."""
    name = "OPENBLAS_NUM_THREADS"
    environment = {k: v for k, v in os.environ.items() if k != name}
    if given is not None:
        environment[name] = given
    code = (
        f"import os, sys; sys.argv[1:] = [{command!r}, '--help']\n"
        "from moetuner.__main__ import main\n"
        "assert 'numpy' not in sys.modules\n"
        "try: main()\nexcept SystemExit: pass\n"
        f"print(os.environ.get({name!r}))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        env=environment,
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.splitlines()[-1] == expected
