"""Bad input ends with exit code 2, one line that says why, and no output file."""

import numpy as np
import pytest


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
        ["--split", "1"],
        ["--split", "nan"],
        ["--seed", "-1"],
        ["--seed", "99999999999"],
        ["--threads", "-1"],
        ["--slots-per-rank", "1"],
        ["--slots-per-rank", "1000000000"],
        ["--memory-slack", "-1"],
        ["--wire", "string"],
        ["--homes", "recorded"],
        ["--homes", "follow"],
        ["--hidden-size", "0"],
        ["--hidden-size", "99999999999999"],
        ["--hardware", "abacus"],
        ["--plot", "figure.txt"],
        ["--plot", "missing/figure.png"],
        ["--plot", "."],
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
    for option in ("--out", "--plot", "--report"):
        assert folder.plan(trace, option, trace).exit_code == 2
    assert trace.read_bytes() == before


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


@pytest.mark.parametrize("kind", ["padding", "no sequence", "one sequence", "no token"])
def test_traces_that_cannot_be_planned_are_refused(folder, ids, kind):
    fields = {}
    if kind == "padding":
        ids = np.full_like(ids, -1)
    if kind == "no sequence":
        fields["sequence"] = None
    if kind == "one sequence":
        fields["sequence"] = np.zeros(len(ids), np.int32)
    if kind == "no token":
        ids = ids[:0]
    trace = folder.trace(ids, **fields)
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
