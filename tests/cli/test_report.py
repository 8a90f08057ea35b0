"""`moetuner report`, and the report that `plan` and `demo` write."""

import numpy as np
import pytest
from moetuner.report.outputs import can_plot
from strategies import random_ids


@pytest.fixture
def planned(folder, ids):
    trace = folder.trace(ids)
    assert folder.plan(trace, solver="chain").exit_code == 0
    return trace


def test_a_page_is_written_about_a_placement_file(folder, planned):
    page = folder.path / "page.html"
    result = folder.run("report", planned, folder.out, "--out", page)
    assert result.exit_code == 0, result.stderr
    priced, sentence, wrote = result.stdout.splitlines()
    assert priced.startswith(f"priced as {folder.out} was planned: wire dedup")
    assert "placement" in sentence
    assert wrote == f"wrote {page}"
    text = page.read_text()
    assert sentence in text
    assert "600 in" not in text
    assert "scored on " in text


def test_plan_writes_the_same_page_about_itself(folder, ids):
    trace = folder.trace(ids)
    pages = folder.path / "plan.html", folder.path / "file.html"
    assert folder.plan(trace, "--report", pages[0], solver="chain").exit_code == 0
    assert folder.run("report", trace, folder.out, "--out", pages[1]).exit_code == 0
    one, other = (page.read_text() for page in pages)
    assert one.replace("chain", "placement") == other.replace("chain", "placement")


def test_two_files_are_compared_with_each_other(folder, planned):
    folder.out.rename(folder.path / "new.json")
    assert folder.plan(planned, solver="random").exit_code == 0
    folder.out.rename(folder.path / "old.json")
    page = folder.path / "page.html"
    arguments = ("--before", folder.path / "old.json", "--out", page)
    result = folder.run("report", planned, folder.path / "new.json", *arguments)
    assert result.exit_code == 0, result.stderr
    assert "gainst old" in result.stdout
    assert "From old to new" in page.read_text()


@pytest.mark.skipif(not can_plot(), reason="matplotlib is not installed")
def test_the_figures_are_written_for_a_paper(folder, ids):
    trace, plots = folder.trace(ids), folder.path / "figures"
    assert folder.plan(trace, solver="ilp2").exit_code == 0
    page = folder.path / "page.html"
    result = folder.run("report", trace, folder.out, "--out", page, "--plots", plots)
    assert result.exit_code == 0, result.stderr
    names = ("gains", "load", "traffic", "coactivation", "flow", "convergence", "moves")
    wanted = {f"{name}{suffix}" for name in names for suffix in (".png", ".svg")}
    assert {path.name for path in plots.iterdir()} == wanted
    for path in plots.iterdir():
        head = b"\x89PNG" if path.suffix == ".png" else b"<?xml"
        assert path.read_bytes().startswith(head)


def test_what_cannot_be_reported_is_refused_before_writing(folder, planned, rng):
    page = folder.path / "page.html"
    other = folder.trace(random_ids(rng, 100, 2, 16, 2), name="other.safetensors")
    own = folder.out.read_bytes()
    for arguments in (
        (other, folder.out, "--out", page),
        (planned, folder.path / "missing.json", "--out", page),
        (planned, planned, "--out", page),
        (planned, folder.out, "--out", folder.out),
        (planned, folder.out, "--out", planned),
        (planned, folder.out, "--out", folder.path / "missing" / "page.html"),
        (planned, folder.out, folder.out, "--out", page),
        (planned, folder.out, "--before", folder.out, "--out", page),
        (planned, folder.out, "--out", page, "--plots", folder.out),
        (planned, "--out", page),
    ):
        result = folder.run("report", *arguments)
        assert result.exit_code == 2, arguments
        assert "rror: " in result.stderr
        assert not page.exists()
    assert folder.out.read_bytes() == own


def test_a_source_that_only_counted_is_reported_as_far_as_it_goes(folder):
    counts = np.random.default_rng(0).integers(1, 50, (9, 2, 16))
    np.savez(folder.path / "counts.npz", counts=counts)
    trace, page = folder.path / "counts.npz", folder.path / "page.html"
    result = folder.plan(trace, "--report", page)
    assert result.exit_code == 0, result.stderr
    assert "only counted loads" in page.read_text()
