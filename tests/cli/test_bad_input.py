"""Bad input ends with exit code 2, one line that says why, and no output file."""

import numpy as np
import pytest
from moetuner.placement.file import read_placement


@pytest.mark.parametrize(
    "arguments",
    [
        ["--ranks", "0"],
        ["--ranks", "17"],
        ["--ranks", "32"],
        ["--ranks", "99999999999"],
        ["--ranks", "x"],
        ["--ranks-per-node", "0"],
        ["--ranks-per-node", "3"],
        ["--solver", "magic"],
        ["--solver", "oracle"],
        ["--time-limit", "nan"],
        ["--time-limit", "inf"],
        ["--time-limit", "-1"],
        ["--time-limit", "0"],
        ["--split", "0"],
        ["--split", "1.5"],
        ["--split", "nan"],
        ["--seed", "-1"],
        ["--seed", "99999999999"],
        ["--threads", "-1"],
        ["--slots-per-rank", "1"],
        ["--slots-per-rank", "1000000000"],
        ["--wire", "string"],
        ["--homes", "recorded"],
        ["--homes", "follow"],
        ["--hidden-size", "0"],
        ["--hidden-size", "99999999999999"],
        ["--hardware", "abacus"],
        ["--hardware", ""],
        ["--hardware", "missing.toml"],
        ["--hardware", "."],
        ["--network", "pigeon"],
        ["--network", "h100"],
        ["--rank-speeds", "1,x"],
        ["--rank-speeds", "1,1"],
        ["--rank-speeds", "1,1,1,0"],
        ["--favour", "few-ranks"],
        ["--move-cost", "1"],
        ["--moves", "moves.json"],
        ["--report", "missing/report.html"],
        ["--report", "."],
        ["--no-such-option"],
    ],
    ids=" ".join,
)
def test_plan_refuses(folder, ids, arguments):
    result = folder.plan(folder.trace(ids), *arguments)
    assert result.exit_code == 2
    assert "rror: " in result.stderr.splitlines()[-1]
    assert result.stdout == ""
    assert not folder.out.exists()


@pytest.mark.parametrize(
    "out", [".", "missing/x.json", "/dev/null", "/proc/x.json", "y" * 300, ""]
)
def test_plan_refuses_output_before_it_solves(folder, ids, out):
    arguments = ("--ranks", 4, "--solver", "lpt", "--out", out)
    result = folder.run("plan", folder.trace(ids), *arguments)
    assert result.exit_code == 2
    assert result.stderr.startswith("error: ")


def test_plan_never_replaces_its_own_trace(folder, ids):
    trace = folder.trace(ids)
    before = trace.read_bytes()
    for option in ("--out", "--report"):
        assert folder.plan(trace, option, trace).exit_code == 2
    assert trace.read_bytes() == before


def test_moves_go_to_a_file_of_their_own(folder, ids):
    trace, old = folder.trace(ids), folder.path / "old.json"
    folder.plan(trace, "--out", old)
    before, text = trace.read_bytes(), old.read_bytes()
    for moves, taken in ((trace, "that is the trace"), (folder.out, "that is --out")):
        result = folder.plan(trace, "--from", old, "--moves", moves, solver="joint")
        assert result.exit_code == 2
        assert taken in result.stderr
    for option in ("--out", "--moves", "--report"):
        result = folder.plan(trace, "--from", old, option, old, solver="joint")
        assert result.exit_code == 2
        assert "that is the placement in use" in result.stderr
    assert not folder.out.exists()
    assert (trace.read_bytes(), old.read_bytes()) == (before, text)


def test_what_is_about_several_traces_needs_several(folder, ids):
    trace = folder.trace(ids)
    for arguments in (("--worst-case",), ("--also", "missing.npz")):
        result = folder.plan(trace, *arguments)
        assert result.exit_code == 2, arguments
        assert result.stderr.splitlines()[-1].startswith("error: ")
    also = folder.trace(ids, name="also.safetensors")
    result = folder.plan(trace, "--also", also, "--moves", also, "--from", trace)
    assert result.exit_code == 2
    assert not folder.out.exists()


def test_a_placement_in_use_must_answer_the_problem(folder, ids):
    trace, old = folder.trace(ids), folder.path / "old.json"
    folder.plan(trace, "--out", old, "--wire", "dedup")
    result = folder.plan(trace, "--from", old, ranks=2, solver="joint")
    assert result.exit_code == 2
    assert "--from" in result.stderr
    folder.plan(trace, "--out", old, "--slots-per-rank", 6, solver="eplb")
    assert read_placement(old).has_replicas
    result = folder.plan(trace, "--from", old, "--slots-per-rank", 5, solver="joint")
    assert result.exit_code == 2
    assert "--from" in result.stderr
    assert "6 experts on a rank" in result.stderr
    assert not folder.out.exists()


BAD_FILES = {
    "empty": b"",
    "text": b"not a trace at all",
    "zip": b"PK\x03\x04 but no zip file",
    "header": (1 << 60).to_bytes(8, "little") + b"{",
    "json": b"\x02\0\0\0\0\0\0\0{}",
    "array": b"\x93NUMPY\x01\0",
}


@pytest.mark.parametrize("name", BAD_FILES)
def test_unreadable_traces_are_refused(folder, name):
    file = folder.path / name
    file.write_bytes(BAD_FILES[name])
    for result in (folder.run("describe", file), folder.plan(file)):
        assert result.exit_code == 2
        assert str(file) in result.stderr


@pytest.mark.parametrize("path", ["missing", ".", "x" * 300, "/dev/null", "a\x01b"])
def test_paths_that_are_no_files_are_refused(folder, ids, path):
    trace = folder.trace(ids)
    for arguments in (["describe", path], ["evaluate", trace, path]):
        result = folder.run(*arguments)
        assert result.exit_code == 2
        assert result.stderr.splitlines()[-1].startswith("error: ")


def test_truncated_trace_is_refused(folder, ids):
    trace = folder.trace(ids)
    trace.write_bytes(trace.read_bytes()[:-7])
    assert folder.run("describe", trace).exit_code == 2


@pytest.mark.parametrize("kind", ["no sequence", "one sequence"])
def test_what_leaves_nothing_to_hold_out_is_planned_whole(folder, ids, kind):
    sequence = None if kind == "no sequence" else np.zeros(len(ids), np.int32)
    trace = folder.trace(ids, sequence=sequence)
    result = folder.plan(trace)
    assert result.exit_code == 0
    assert "nothing was held out" in result.stdout
    assert "Scores on the tokens that it is planned on" in result.stdout


@pytest.mark.parametrize("kind", ["padding", "no token"])
def test_traces_that_cannot_be_planned_are_refused(folder, ids, kind):
    if kind == "padding":
        ids = np.full_like(ids, -1)
    if kind == "no token":
        ids = ids[:0]
    trace = folder.trace(ids)
    assert folder.run("describe", trace, "--json").exit_code == 0
    result = folder.plan(trace)
    assert result.exit_code == 2
    assert result.stderr.splitlines()[-1].startswith("error: ")


def test_padding_can_be_evaluated(folder, ids):
    folder.plan(folder.trace(ids))
    padding = folder.trace(np.full_like(ids, -1), name="padding.safetensors")
    assert folder.run("evaluate", padding, folder.out, "--json").exit_code == 0


def test_evaluate_refuses_the_placement_of_another_model(folder, ids):
    folder.plan(folder.trace(ids))
    for other in (folder.trace(ids, 20, "a.safetensors"),):
        result = folder.run("evaluate", other, folder.out)
        assert result.exit_code == 2
        assert str(folder.out) in result.stderr
    fewer = folder.trace(np.ascontiguousarray(ids[:, :2]), name="b.safetensors")
    assert folder.run("evaluate", fewer, folder.out).exit_code == 2


def test_demo_refuses_a_file_as_folder(folder, ids):
    result = folder.run("demo", "--out-dir", folder.trace(ids))
    assert result.exit_code == 2
    assert result.stdout == ""
