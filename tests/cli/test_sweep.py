"""`moetuner sweep`: tables for eyes, CSV and JSON for programs."""

import csv
import json
import signal
from dataclasses import replace

import numpy as np
import pytest
from moetuner import HARDWARE, write_hardware
from moetuner.placement.file import read_placement
from strategies import random_ids
from test_process import LONG, MOETUNER, WAIT, start

MEASURES = ("time", "tokens_per_second", "memory")


def sweep(folder, trace, *arguments):
    more = ("--solver", "lpt", "--threads", 2)
    return folder.run("sweep", trace, *more, *arguments)


def cells_of(folder, trace, *arguments):
    result = sweep(folder, trace, *arguments, "--json")
    assert result.exit_code == 0, result.stderr
    return json.loads(result.stdout)


def test_every_combination_is_a_cell_and_the_best_are_named(folder, ids):
    trace = folder.trace(ids)
    asked = ("--ranks", "4,8", "--redundant", "0,8", "--hardware", "h100,h200")
    found = cells_of(folder, trace, *asked)
    cells = found["cells"]
    keys = ("hardware", "ranks", "redundant")
    assert [tuple(cell[key] for key in keys) for cell in cells] == [
        (machine, ranks, spare)
        for machine in ("h100", "h200")
        for ranks in (4, 8)
        for spare in (0, 8)
    ]
    assert all(cell["why_not"] is None for cell in cells)
    assert set(found["best"]) == set(MEASURES)
    fastest = cells[found["best"]["time"]]["batch_seconds"]
    assert fastest == min(cell["batch_seconds"] for cell in cells)
    shown = sweep(folder, trace, *asked).stdout
    for words in ("best by time: ", "best by tokens/s a GPU: ", "best by memory: "):
        assert words in shown


def test_a_cell_is_what_plan_makes_of_the_same_options(folder, ids):
    trace = folder.trace(ids)
    (cell,) = cells_of(folder, trace, "--ranks", 4, "--slots-per-rank", 5)["cells"]
    plan = folder.plan_json(trace, "--slots-per-rank", 5)
    scores = {each["name"]: each for each in plan["placements"]}
    assert cell["batch_seconds"] == scores["lpt"]["batch_seconds_mean"]
    assert cell["imbalance"] == scores["lpt"]["imbalance_mean"]
    assert cell["best_baseline"] == plan["best_baseline"]["name"]
    gain = plan["best_baseline"]["gain"]
    assert (cell["gain"], cell["gain_low"]) == (gain["gain"], gain["low"])
    assert cell["held_out"]


def test_cells_that_cannot_be_planned_are_named_not_dropped(folder, ids):
    trace = folder.trace(ids)
    asked = ("--ranks", "8,12,32", "--redundant", "0,3", "--hidden-size", 64)
    result = sweep(folder, trace, *asked, "--expert-hidden-size", 64)
    assert result.exit_code == 0, result.stderr
    assert "1 of 6 cells can be planned" in result.stderr
    said = result.stdout
    assert "not planned: --ranks-per-node must divide --ranks 12, got 8" in said
    assert "not planned: --redundant must leave equal slots on 8 ranks" in said
    assert "--ranks must be at most 16, the number of experts" in said
    found = cells_of(folder, trace, *asked)["cells"]
    assert sum(cell["why_not"] is not None for cell in found) == 5


def test_weights_that_do_not_fit_are_not_planned(folder, ids):
    trace = folder.trace(ids)
    sizes = ("--hidden-size", 1024, "--expert-hidden-size", 1024)
    gigabytes = 3 * 1024 * 1024 * 2 * 3 * 2 / 1e9  # three layers of two experts
    asked = ("--ranks", "4,8", *sizes, "--memory", gigabytes)
    four, eight = cells_of(folder, trace, *asked)["cells"]
    assert "is less than the expert weights of a GPU" in four["why_not"]
    assert eight["weight_bytes_per_gpu"] == pytest.approx(gigabytes * 1e9)


def test_batches_grow_with_the_gpus_when_asked(folder, ids):
    trace = folder.trace(ids)
    found = cells_of(folder, trace, "--ranks", "2,4", "--tokens-per-gpu", 25)["cells"]
    assert [cell["batch_tokens"] for cell in found] == [50, 100]
    assert [cell["batches"] for cell in found] == [6, 3]
    assert [cell["batch_size"] for cell in found] == [50, 100]


def test_csv_holds_the_cells_of_the_json(folder, ids):
    trace, file = folder.trace(ids), folder.path / "cells.csv"
    asked = ("--ranks", "4,12", "--csv", file)
    cells = cells_of(folder, trace, *asked)["cells"]
    with file.open(newline="") as opened:
        rows = list(csv.DictReader(opened))
    assert len(rows) == len(cells) == 2
    for row, cell in zip(rows, cells, strict=True):
        assert row == {k: "" if v is None else str(v) for k, v in cell.items()}


@pytest.mark.parametrize("suffix", [".svg", ".png"])
def test_plot_is_drawn(folder, ids, suffix):
    pytest.importorskip("matplotlib")
    file = folder.path / f"plot{suffix}"
    result = sweep(
        *(folder, folder.trace(ids), "--ranks", "2,4,8", "--redundant", "0,8"),
        *("--plot", file),
    )
    assert result.exit_code == 0, result.stderr
    assert f"wrote {file}" in result.stdout
    drawn = file.read_bytes()
    if suffix == ".svg":
        text = drawn.decode()
        assert text.count("<!-- 8 spare, h100 -->") == 1
        assert "tokens/s a GPU" in text
    else:
        assert drawn.startswith(b"\x89PNG")


def test_placements_of_all_cells_are_kept(folder, ids):
    kept = folder.path / "plans"
    asked = ("--ranks", "2,4", "--redundant", "0,4", "--placements", kept)
    cells = cells_of(folder, folder.trace(ids), *asked)["cells"]
    names = sorted(path.name for path in kept.iterdir())
    shapes = ("2x10", "2x8", "4x4", "4x5")
    assert names == [f"h100-{shape}.json" for shape in shapes]
    placement = read_placement(kept / "h100-4x5.json")
    assert placement.topology.num_ranks == 4
    value = placement.provenance.options["slots_per_rank"]
    assert value == cells[3]["slots_per_rank"] == 5


def test_two_machines_of_one_name_are_refused(folder, ids):
    """Else the placements of one would be written over those of the other."""
    slow = folder.path / "slow.toml"
    write_hardware(replace(HARDWARE["h100"], memory_bandwidth=1e12), slow)
    trace, kept = folder.trace(ids), folder.path / "plans"
    asked = ("--ranks", 4, "--placements", kept, "--hardware")
    result = sweep(folder, trace, *asked, f"h100,{slow}")
    assert result.exit_code == 2
    assert "h100 and h100 are two machines of one name" in result.stderr
    assert list(kept.iterdir()) == []
    cells = cells_of(folder, trace, *asked, "h100,h100")["cells"]
    assert len(cells) == 1  # each once


def test_the_best_are_named_with_the_spare_slots_that_they_have(folder, ids):
    """16 experts on 3 GPUs: just enough are 18 slots."""
    machine = ("--ranks-per-node", 3)
    shown = sweep(folder, folder.trace(ids), "--ranks", 3, *machine).stdout
    assert "best by time: 3 GPUs, 2 spare, h100" in shown


def test_a_gain_that_is_none_has_no_sign(folder, ids):
    """One GPU has one plan: all placements take as long."""
    shown = sweep(folder, folder.trace(ids), "--ranks", 1).stdout
    assert " 0.0%?" in shown
    assert "+0.0%" not in shown


def test_every_line_of_the_table_fits_80_columns(folder, ids):
    shown = sweep(
        *(folder, folder.trace(ids), "--ranks", "2,4,8", "--redundant", "0,4,8"),
        *("--hardware", "h100,gb200-nvl72", "--batch-tokens", 0),
    ).stdout.splitlines()
    start_of = next(i for i, line in enumerate(shown) if line.startswith("Plans, "))
    end = next(i for i, line in enumerate(shown) if line.startswith("spare: slots"))
    assert max(len(line.rstrip()) for line in shown[start_of : end + 4]) <= 80


def test_quiet_says_nothing_but_the_result(folder, ids):
    sizes = ("--hidden-size", 64, "--expert-hidden-size", 64)
    asked = ("--ranks", "4,12", *sizes, "--json", "--quiet")
    result = sweep(folder, folder.trace(ids), *asked)
    assert result.stderr == ""
    json.loads(result.stdout)


def test_assumed_sizes_are_told_once(folder, ids):
    machines = ("--hardware", "h100,h200")
    result = sweep(folder, folder.trace(ids), "--ranks", 4, *machines)
    assert result.stderr.count("is not in the table") == 1


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("--ranks", "4,x"), "--ranks must be whole numbers between commas"),
        (("--ranks", ""), "--ranks must be whole numbers between commas"),
        (("--ranks", "0,4"), "--ranks must be >= 1, got 0"),
        (("--ranks", "4", "--redundant", "-1"), "--redundant must be whole numbers"),
        (
            ("--ranks", "4", "--redundant", "4", "--slots-per-rank", "5"),
            "--redundant and --slots-per-rank: give one",
        ),
        (
            ("--ranks", "4", "--tokens-per-gpu", "4", "--batch-tokens", "5"),
            "--tokens-per-gpu and --batch-tokens: give one",
        ),
        (("--ranks", "4", "--memory", "-5"), "--memory must be > 0 GB, got -5"),
        (("--ranks", "4", "--hardware", "h100,,h200"), "names or files between commas"),
        (("--ranks", "4", "--hardware", "h900"), "--hardware must be one of a100"),
        (("--ranks", "32,64"), "--ranks must be at most 16"),
        (("--ranks", "4", "--hardware", "h100,nothing"), "nothing"),
        (("--ranks", "4", "--plot", "plot.txt"), "wanted one of .svg, .png, .pdf"),
        (("--ranks", "4", "--csv", "trace.safetensors"), "that is an input"),
        (("--ranks", "4", "--placements", "trace.safetensors"), "wanted a folder"),
    ],
)
def test_bad_input_is_code_2_and_named(folder, ids, monkeypatch, arguments, said):
    trace = folder.trace(ids)
    monkeypatch.chdir(folder.path)
    result = sweep(folder, trace, *arguments)
    assert result.exit_code == 2
    assert said in result.stderr.splitlines()[-1]


def test_ctrl_c_keeps_the_cells_that_are_done(folder, rng):
    """One GPU has one plan, which is there at once; the search for eight goes on."""
    trace = folder.trace(random_ids(rng, 3000, 12, 64, 4), 64)
    kept = folder.path / "cells.csv"
    process = start(
        [
            *(*MOETUNER, "sweep", str(trace), "--ranks", "1,8", "--csv", str(kept)),
            *("--time-limit", str(LONG), "--threads", "2", "--json"),
        ]
    )
    for line in process.stderr:
        if line.startswith("cell 2/2, ") and "incumbent" in line:
            break
    process.send_signal(signal.SIGINT)
    output, errors = process.communicate(timeout=WAIT)
    assert process.returncode == 130, errors
    assert "error: interrupted: 1 of 2 cells was planned" in errors
    found = json.loads(output)
    assert found["interrupted"]
    assert [cell["why_not"] for cell in found["cells"]] == [None, "interrupted"]
    assert kept.read_text().count("\n") == 3
    assert np.isfinite(found["cells"][0]["batch_seconds"])
