"""Plans that start from a placement in use, and placements for other machines."""

import json

import pytest
from moetuner.placement.file import read_placement
from moetuner.planning.provenance import pricing_of
from moetuner.report.words import gap


def test_what_is_in_use_has_a_row_and_its_moves_are_said(folder, ids):
    trace, old = folder.trace(ids), folder.path / "old.json"
    folder.plan(trace, "--out", old, solver="random")
    page = folder.path / "page.html"
    result = folder.plan(trace, "--from", old, "--report", page, solver="joint")
    assert result.exit_code == 0, result.stderr
    rows = [line.split()[:2] for line in result.stdout.splitlines()]
    assert rows.count(["in", "use"]) == 2  # scores and batches
    assert "gain over in use" in result.stdout
    assert "From the placement in use, " in result.stdout
    assert " of 48 experts change ranks, " in result.stdout
    assert "From in use to joint: " in page.read_text()


def test_prices_of_the_placement_in_use_are_kept_unless_options_say_otherwise(
    folder, ids
):
    trace, old = folder.trace(ids), folder.path / "old.json"
    asked = ("--hardware", "h200", "--batch-tokens", 64, "--wire", "per_expert")
    folder.plan(trace, "--out", old, *asked)
    told = pricing_of(read_placement(old))
    command = (trace, "--from", old, "--prove", 0)
    kept = folder.plan(*command, solver="joint")
    assert f"priced as {old} was planned: wire per_expert" in " ".join(
        kept.stderr.split()
    )
    assert pricing_of(read_placement(folder.out)) == told
    other = folder.plan(*command, "--hardware", "h100", solver="joint").stderr
    assert f"; {old} was planned with hardware h200" in " ".join(other.split())
    new = pricing_of(read_placement(folder.out))
    assert new.cost.hardware.name == "h100"
    assert (new.batch_tokens, new.cost.wire) == (64, told.cost.wire)


def test_other_ranks_are_no_fault_of_prices_that_nobody_typed(folder, ids):
    trace, old = folder.trace(ids), folder.path / "old.json"
    folder.plan(trace, "--out", old, "--rank-speeds", "1,1,1,2", ranks=4)
    result = folder.plan(trace, "--from", old, ranks=8, solver="joint")
    assert result.exit_code == 2
    said = " ".join(result.stderr.split())
    assert "--from, the placement in use: it is for 4 ranks in nodes of" in said
    assert "--rank-speeds" not in said


def test_the_file_tells_the_bound_that_was_proven_last(folder, ids):
    trace = folder.trace(ids)
    shown = folder.plan(trace, "--prove", 1, solver="joint").stdout
    (row,) = (line for line in shown.splitlines() if line.startswith("lower bound"))
    told = read_placement(folder.out).provenance
    assert gap(told.value, told.lower_bound) in row


def test_placements_for_more_gpus_are_compared_per_gpu(folder, ids):
    trace, wide = folder.trace(ids), folder.path / "wide.json"
    folder.plan(trace, ranks=4)
    folder.plan(trace, "--out", wide, ranks=8)
    shown = folder.run("evaluate", trace, folder.out, wide).stdout
    assert "gain per GPU: " in shown
    rows = (line.split() for line in shown.splitlines() if ".json " in line)
    few, many = (row for row in rows if len(row) == 8)  # those of batches
    one, other = json.loads(
        folder.run("evaluate", trace, folder.out, wide, "--json").stdout
    )
    assert (one["num_ranks"], other["num_ranks"]) == (4, 8)
    assert (few[5], many[5]) == ("4", "8")
    assert few[6] == f"{one['tokens_per_second_per_rank']:,.0f}"
    ratio = one["tokens_per_second_per_rank"] / other["tokens_per_second_per_rank"]
    assert float(many[7].rstrip("%")) == pytest.approx(100 * (1 - ratio), abs=0.06)
    alike = folder.run("evaluate", trace, folder.out, folder.out).stdout
    assert "per GPU" not in alike
