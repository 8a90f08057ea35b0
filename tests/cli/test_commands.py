"""Every command on good input: what it prints, writes and returns."""

import json
from dataclasses import asdict

import numpy as np
import pytest
from moetuner import __version__
from moetuner.cli import app
from moetuner.placement.file import read_placement
from moetuner.placement.moves import fetched_replicas, moves_between
from strategies import random_ids
from typer.main import get_command

QUICK = ("contiguous", "random", "lpt", "eplb", "affinity", "coactivation", "chain")
SCORES = (
    "imbalance_mean",
    "imbalance_worst",
    "remote_ranks_per_token",
    "remote_nodes_per_token",
    "modelled_seconds",
)


def test_version_and_help_name_every_command_and_option(folder):
    assert folder.run("--version").stdout == f"moetuner {__version__}\n"
    usage = folder.run("--help").stdout
    assert all(
        name in usage for name in ("describe", "plan", "evaluate", "certify", "demo")
    )
    options = folder.run("plan", "--help").stdout
    for name in (
        "--ranks-per-node",
        "--expert-hidden-size",
        "--time-limit",
        "--solver",
    ):
        assert name in options  # whole, not cut to the width of a column


@pytest.mark.parametrize("command", sorted(get_command(app).commands))
def test_help_fits_80_columns(folder, command):
    lines = folder.run(command, "--help").stdout.splitlines()
    assert max(map(len, lines)) <= 80


def test_describe_prints_a_table_or_json(folder, ids):
    trace = folder.trace(ids)
    assert "600 in 30 sequences" in folder.run("describe", trace).stdout
    described = json.loads(folder.run("describe", trace, "--json").stdout)
    assert described["num_tokens"] == 600
    assert described["num_experts"] == 16


@pytest.mark.parametrize("solver", ["contiguous", "random", "lpt", "chain", "ilp1"])
def test_plan_scores_each_baseline_and_the_result_once(folder, ids, solver):
    report = folder.plan_json(folder.trace(ids), solver=solver)
    names = [placement["name"] for placement in report["placements"]]
    assert names[0] == "contiguous"
    assert sorted(names) == sorted({*QUICK, solver})
    for placement in report["placements"]:
        assert all(placement[score] >= 0 for score in SCORES)
        has_gain = placement["gain"] is not None
        assert has_gain == (placement["name"] != "contiguous")


def test_what_is_in_use_may_hold_replicas(folder, ids):
    trace = folder.trace(ids)
    old, moves = folder.path / "old.json", folder.path / "moves.json"
    folder.plan(trace, "--out", old, "--slots-per-rank", 5, solver="eplb")
    arguments = ("--from", old, "--moves", moves)
    report = folder.plan_json(trace, *arguments, solver="joint")
    assert report["options"]["slots_per_rank"] == 5  # those of the old one
    before, after = read_placement(old), read_placement(folder.out)
    assert before.has_replicas
    steps = json.loads(moves.read_text())["moves"]
    assert steps == [asdict(step) for step in moves_between(before, after)]
    assert len(steps) <= fetched_replicas(before, after).size


def test_redundant_experts_are_those_that_engines_count(folder, ids):
    trace = folder.trace(ids)
    report = folder.plan_json(trace, "--redundant", 4, solver="eplb")
    assert report["options"]["slots_per_rank"] == 5  # 16 experts on 4 ranks
    both = folder.plan(trace, "--redundant", 4, "--slots-per-rank", 5, solver="eplb")
    assert both.exit_code != 0
    assert "give --redundant or --slots-per-rank, not both" in both.stderr
    odd = folder.plan(trace, "--redundant", 5, solver="eplb")
    assert odd.exit_code != 0
    assert "--redundant must" in odd.stderr


def test_eplb_fills_spare_slots_with_replicas(folder, ids):
    folder.plan(folder.trace(ids), "--slots-per-rank", 5, solver="eplb")
    placement = read_placement(folder.out)
    assert placement.has_replicas
    assert (placement.slot_experts >= 0).all()


def test_baselines_are_as_many_as_asked_for(folder, ids):
    trace, names = folder.trace(ids), {}
    for wanted in ("none", "quick", "all"):
        report = folder.plan_json(trace, "--baselines", wanted, "--slots-per-rank", 5)
        names[wanted] = [placement["name"] for placement in report["placements"]]
    assert names["none"] == ["contiguous", "lpt"]
    assert set(names["quick"]) == {*QUICK, "eplb+replica"}
    assert set(names["all"]) - set(names["quick"]) == {"ilp2"}


def test_moves_lead_from_the_placement_in_use_to_the_plan(folder, ids):
    trace = folder.trace(ids)
    old, moves = folder.path / "old.json", folder.path / "moves.json"
    folder.plan(trace, "--out", old, solver="random")
    arguments = ("--from", old, "--moves", moves, "--move-cost")
    counts = []
    for cost in (0, 1e9):
        assert folder.plan(trace, *arguments, cost, solver="joint").exit_code == 0
        rank = read_placement(old).rank_of().copy()
        steps = json.loads(moves.read_text())["moves"]
        for step in steps:
            assert rank[step["layer"], step["expert"]] == step["source"]
            rank[step["layer"], step["expert"]] = step["target"]
            if step["exchanged"] is not None:
                assert rank[step["layer"], step["exchanged"]] == step["target"]
                rank[step["layer"], step["exchanged"]] = step["source"]
            assert (np.bincount(rank[step["layer"]]) <= 4).all()
        np.testing.assert_array_equal(rank, read_placement(folder.out).rank_of())
        counts.append(len(steps))
    assert counts[0] > counts[1] == 0


def test_a_plan_for_several_traces_scores_and_names_each(folder, ids, rng):
    first = folder.trace(ids)
    second = folder.trace(random_ids(rng, 400, 3, 16, 2), name="second.safetensors")
    report = folder.plan_json(first, "--also", second, solver="joint")
    (other,) = report["others"]
    names = [placement["name"] for placement in report["placements"]]
    assert [placement["name"] for placement in other["placements"]] == names
    assert other["plan_tokens"] + other["score_tokens"] == 400
    assert report["options"]["worst_case"] is False
    table = folder.plan(first, "--also", second, "--worst-case", solver="joint")
    assert f"trace 2: planned on {other['plan_tokens']} tokens too" in table.stdout
    page = folder.path / "report.html"
    assert folder.run("report", second, folder.out, "--out", page).exit_code == 0
    page = page.read_text()
    assert f"Planned on {other['plan_tokens']} tokens of this recording" in page


def test_plan_writes_the_placement_with_the_resolved_options(folder, ids):
    report = folder.plan_json(folder.trace(ids), "--seed", 3)
    content = json.loads(folder.out.read_text())
    assert (content["num_ranks"], content["ranks_per_node"]) == (4, 4)
    assert list(content["layers"]) == ["0", "1", "2"]
    assert all(sorted(row) == list(range(16)) for row in content["layers"].values())
    options = content["provenance"]["options"]
    assert options["solver_options"]["seed"] == 3
    assert options["cost"]["wire"] == "dedup"
    assert options["slots_per_rank"] == 4
    assert report["options"] == options


def test_plan_table_names_all_scores_and_the_written_file(folder, ids):
    result = folder.plan(folder.trace(ids))
    for text in ("mean", "worst", "ranks", "nodes", "receive", "(ms)", "95% interval"):
        assert text in result.stdout
    assert str(folder.out) in result.stdout.replace("\n", "")


@pytest.mark.parametrize(
    ("ranks", "per_node"), [(1, 1), (4, 4), (8, 8), (16, 8)], ids=str
)
def test_nodes_hold_eight_gpus_unless_told(folder, ids, ranks, per_node):
    report = folder.plan_json(folder.trace(ids), ranks=ranks)
    assert report["ranks_per_node"] == per_node


def test_twelve_ranks_need_a_word_on_nodes(folder, ids):
    trace = folder.trace(ids)
    refused = folder.plan(trace, ranks=12)
    assert refused.exit_code == 2
    assert "--ranks-per-node" in refused.stderr
    report = folder.plan_json(trace, "--ranks-per-node", 6, ranks=12)
    assert report["ranks_per_node"] == 6


def test_json_alone_goes_to_standard_output(folder, ids):
    result = folder.plan(folder.trace(ids), "--json")
    json.loads(result.stdout)
    assert "note: model 'unknown'" in result.stderr
    sizes = ("--hidden-size", 64, "--expert-hidden-size", 8)
    assert folder.plan(folder.trace(ids), "--json", "--quiet", *sizes).stderr == ""


def test_evaluate_scores_each_placement_file(folder, ids):
    trace = folder.trace(ids)
    files = []
    for solver in ("contiguous", "lpt"):
        folder.plan(trace, solver=solver)
        files.append(folder.out.rename(folder.path / f"{solver}.json"))
    scores = json.loads(folder.run("evaluate", trace, *files, "--json").stdout)
    assert [score["placement"] for score in scores] == [str(file) for file in files]
    assert all(np.isfinite(score[name]) for score in scores for name in SCORES)
    assert scores[0]["imbalance_mean"] > scores[1]["imbalance_mean"]
    table = folder.run("evaluate", trace, *files).stdout
    assert all(str(file) in table for file in files)


def test_evaluate_counts_what_a_hand_counts(folder):
    """Tokens choose {0, 1} or {2, 3}; blocks of two keep each on one of two ranks."""
    ids = np.array([[[0, 1]], [[2, 3]], [[0, 1]], [[0, 1]]], np.int16)
    trace = folder.trace(ids, 4, sequence=np.arange(4, dtype=np.int32))
    folder.plan(trace, ranks=2, solver="contiguous")
    (score,) = json.loads(folder.run("evaluate", trace, folder.out, "--json").stdout)
    assert score["imbalance_mean"] == 1.5  # 6 of 8 rows on one of two ranks
    assert score["remote_ranks_per_token"] == 0.5  # half of the homes are elsewhere
    assert score["remote_nodes_per_token"] == 0


def test_a_slow_rank_takes_longer(folder, ids):
    trace = folder.trace(ids)
    folder.plan(trace, ranks=2, solver="contiguous")
    seconds = [
        json.loads(folder.run("evaluate", trace, folder.out, "--json", *more).stdout)[
            0
        ]["compute_seconds"]
        for more in ((), ("--rank-speeds", "1,1"), ("--rank-speeds", "0.5,0.5"))
    ]
    assert seconds[0] == seconds[1]
    assert np.allclose(2 * np.array(seconds[0]), seconds[2])


def test_one_rank_and_uniform_router_promise_no_gain(folder, rng):
    uniform = random_ids(rng, 4000, 3, 16, 2, skew=0.0)
    trace = folder.trace(uniform)
    assert "No gain to be had" in folder.plan_json(trace, ranks=1)["verdict"]
    assert "No gain to be had" in folder.plan_json(trace)["verdict"]


def test_allgather_promises_no_gain_in_traffic(folder, ids):
    report = folder.plan_json(folder.trace(ids), "--wire", "allgather")
    assert "no gain in traffic" in report["verdict"]
    assert len({p["dispatch_seconds"] for p in report["placements"]}) == 1


def test_count_only_source_is_scored_by_load(folder, traces_dir):
    trace = traces_dir / "gemma-4-26b-a4b-avifenesh" / "theme_counts.npz"
    result = folder.plan(trace, "--json", ranks=8)
    assert "only counted loads" in result.stderr
    report = json.loads(result.stdout)
    assert report["options"]["cost"]["wire"] == "allgather"
    assert "transitions" in report["left_out"]["chain"]
    shown = folder.plan(trace, ranks=8).stdout
    assert "left out chain: solver chain needs layer-to-layer trans" in shown
    for refused in (
        folder.plan(trace, "--wire", "dedup"),
        folder.plan(trace, solver="ilp2"),
    ):
        assert refused.exit_code == 2
        assert "only counted" in refused.stderr


def test_demo_plans_the_shipped_trace(folder):
    results = folder.path / "new" / "results"
    result = folder.run("demo", "--out-dir", results, "--time-limit", 1, "--threads", 2)
    assert result.exit_code == 0, result.stderr
    assert read_placement(results / "placement.json").topology.num_nodes == 2
    for text in ("tokens", "contiguous", "joint", "placement.json"):
        assert text in result.stdout


def test_certify_prints_value_bound_and_gap(folder, ids):
    trace = folder.trace(ids)
    folder.plan_json(trace, solver="lpt")
    found = json.loads(
        folder.run("certify", trace, folder.out, "--time-limit", 5, "--json").stdout
    )
    scored = json.loads(folder.run("evaluate", trace, folder.out, "--json").stdout)
    assert found["value"] == scored[0]["batch_seconds_mean"]
    assert 0 < found["counting_bound"] <= found["lower_bound"] <= found["value"]
    assert found["gap"] == 1 - found["lower_bound"] / found["value"]
    text = folder.run("certify", trace, folder.out, "--time-limit", 5, "--quiet").stdout
    assert "no placement on these slots (without replicas) takes less than" in text


def test_refit_writes_the_plan_of_all_tokens_and_scores_that_of_one_part(folder, ids):
    trace = folder.trace(ids)
    scored = folder.plan_json(trace)
    part = read_placement(folder.out)
    again = folder.plan_json(trace, "--refit")
    written = read_placement(folder.out)
    for one, other in zip(again["placements"], scored["placements"], strict=True):
        assert one["batch_seconds"] == other["batch_seconds"]
    assert again["refit"]["placement_sha256"] == written.sha256() != part.sha256()
    assert written.provenance.validation == again["refit"]["validation"]
    result = folder.plan(trace, "--refit", "--split", 0.25)
    assert "up to 2 s for the plan that is scored, then up to 8 s" in result.stderr
    shown = result.stdout
    assert "Written is the plan that the same options make of all tokens" in shown
    assert shown.count("wrote ") == 1
    page = folder.path / "page.html"
    assert folder.plan(trace, "--refit", "--report", page).exit_code == 0
    assert f"made of all tokens, sha256 {written.sha256()}" in page.read_text()


def test_refit_of_what_holds_nothing_out_is_told(folder, ids):
    trace = folder.trace(ids, sequence=np.zeros(600, np.int32))
    result = folder.plan(trace, "--refit")
    assert "no plan was made anew: nothing was held out" in result.stderr
    refused = folder.plan(trace, "--refit", "--split", 1)
    assert refused.exit_code == 2
    assert "--split is 1, so refit has nothing to add" in refused.stderr
