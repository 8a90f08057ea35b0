"""What every command takes, and that its messages name what was typed."""

import dataclasses
import json

import numpy as np
import pytest
import typer
from moetuner.cli import app
from moetuner.cli.messages import as_typed
from moetuner.evaluation.hardware import HARDWARE, NETWORKS, with_network
from moetuner.evaluation.hardware_file import (
    read_hardware,
    read_network,
    write_hardware,
)
from moetuner.evaluation.rates import Bandwidth, Latency
from moetuner.placement.file import read_placement, write_placement
from moetuner.placement.model import Provenance
from moetuner.planning.provenance import options_of

COST = [
    *("--wire", "--homes", "--replica-rule", "--batch-tokens", "--batch-kind"),
    *("--phase", "--hardware", "--network", "--rank-speeds"),
    *("--model", "--weights", "--rows", "--hidden-size", "--expert-hidden-size"),
]
FROZEN = {
    "describe": [
        *("trace", "--ranks", "--batch-tokens", "--batch-kind", "--top-k", "--phase"),
        "--json",
    ],
    "plan": [
        *("trace", "--ranks", "--ranks-per-node", "--slots-per-rank", "--redundant"),
        *(
            "--solver",
            "--time-limit",
            "--seed",
            "--threads",
            "--split",
            "--refit",
            "--also",
        ),
        *("--worst-case", "--favour", "--from", "--move-cost", "--prove"),
        *("--baselines", *COST),
        *("--top-k", "--out", "--moves", "--report", "--json", "--quiet"),
    ],
    "evaluate": ["trace", "placements", *COST, "--top-k", "--json", "--quiet"],
    "verify": [
        *("trace", "placement", "counters", "--times", "--within", *COST),
        *("--json", "--quiet"),
    ],
    "report": [
        *("trace", "placements", "--out", "--before", "--plots", *COST),
        *("--top-k", "--quiet"),
    ],
    "certify": [
        *("trace", "placement", "--time-limit", "--threads", *COST),
        *("--top-k", "--json", "--quiet"),
    ],
    "calibrate": [
        *("--out", "--out-fixed", "--ranks-per-node", "--seconds", "--device"),
        *("--model", "--hidden-size", "--expert-hidden-size", "--experts", "--top-k"),
        *("--values", "--like", "--measurements", "--plot", "--quiet"),
    ],
    "hardware": ["which"],
    "drift": [
        *("placement", "trace", "--recording", "--threshold", "--steps"),
        *("--time-limit", "--seed", "--threads", "--split", "--out", *COST),
        *("--top-k", "--json", "--quiet"),
    ],
    "sweep": [
        *("trace", "--ranks", "--ranks-per-node", "--redundant", "--slots-per-rank"),
        *("--tokens-per-gpu", "--memory", "--solver", "--time-limit", "--seed"),
        *("--threads", "--split", "--csv", "--plot", "--placements", *COST),
        *("--top-k", "--json", "--quiet"),
    ],
    "demo": ["--out-dir", "--time-limit", "--threads", "--quiet"],
    "import": [
        *("files", "--out", "--format", "--model", "--dataset", "--num-experts"),
        *("--num-layers", "--top-k", "--layers", "--placement", "--quiet"),
    ],
    "export": [
        *("placement", "--to", "--out", "--num-layers", "--moe-layers"),
        *("--mtp-layers", "--trace", "--pull-request"),
        *("--hidden-size", "--expert-hidden-size", "--quiet"),
    ],
    "import-placement": [
        *("file", "--out", "--format", "--ranks", "--ranks-per-node", "--layers"),
        "--model",
    ],
}


def test_the_options_of_every_command_are_these_and_no_others():
    """A new option is a promise: add it here, to the docs and to the changelog."""
    commands = typer.main.get_command(app).commands
    found = {
        name: [parameter.opts[0] for parameter in command.params]
        for name, command in commands.items()
    }
    assert found == FROZEN


@pytest.mark.parametrize(
    ("message", "wanted"),
    [
        ("PlanOptions: plan_fraction must be in", "--split must be in"),
        (
            "Topology: ranks_per_node must divide num_ranks=4, got 3",
            "--ranks-per-node must divide --ranks 4, got 3",
        ),
        ("plan: homes=recorded needs", "--homes recorded needs"),
        ("plan: stay, the placement", "--from, the placement"),
        ("PlanOptions: a rank would stay empty",) * 2,
        ("SolverOptions: seed must be", "--seed must be"),
        ("CostModel: rank_speeds names 2 ranks", "--rank-speeds names 2 ranks"),
        ("old.json: slots_per_rank is 4",) * 2,
        ("PlanOptions: rank_weight must be",) * 2,  # no option
        ("anything else",) * 2,
    ],
)
def test_arguments_are_named_as_typed(message, wanted):
    assert as_typed(message, FROZEN["plan"]) == wanted


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("--split", 0),
        ("--time-limit", "nan"),
        ("--time-limit", -1),
        ("--ranks-per-node", 3),
        ("--slots-per-rank", 100),
        ("--slots-per-rank", 1),
        ("--redundant", 3),
        ("--ranks", 17),
        ("--prove", -1),
        ("--rank-speeds", "1,1"),
        ("--rank-speeds", "1,1,1,0"),
        ("--homes", "recorded"),
        ("--move-cost", "nan"),
        ("--move-cost", -1),
        ("--from", "lpt.json"),
    ],
)
def test_a_refused_value_names_its_option(folder, ids, option, value):
    trace = folder.trace(ids)
    other = folder.path / "lpt.json"
    assert folder.plan(trace, "--out", other, ranks=2).exit_code == 0
    more = []
    if option == "--from":
        value, more = other, ["--solver", "joint"]
    if option == "--move-cost":
        more = ["--from", other, "--solver", "joint"]
    result = folder.plan(trace, option, value, *more)
    assert result.exit_code == 2
    assert option in result.stderr.splitlines()[-1]
    assert not folder.out.exists()


def test_the_cost_of_a_move_is_told_in_the_unit_that_was_typed(folder, ids):
    trace, used = folder.trace(ids), folder.path / "used.json"
    assert folder.plan(trace, "--out", used).exit_code == 0
    result = folder.plan(
        trace, "--solver", "joint", "--from", used, "--move-cost", "-1"
    )
    assert result.exit_code == 2
    said = "--move-cost must be at least 0 microseconds, got -1"
    assert said in result.stderr.replace("\n", " ")


SPEEDS = "1,1,0.5,0.25"


@pytest.fixture
def planned(folder, ids):
    """A plan whose prices are nobody's defaults."""
    trace = folder.trace(ids)
    result = folder.plan(
        trace,
        *("--rank-speeds", SPEEDS, "--hardware", "h200", "--batch-tokens", 100),
        *("--batch-kind", "mixed", "--hidden-size", 512, "--expert-hidden-size", 128),
        *("--wire", "per_expert"),
    )
    assert result.exit_code == 0, result.stderr
    return trace


def test_scores_are_priced_as_the_placement_was_planned(folder, planned):
    own = read_placement(folder.out).provenance.options
    (score,) = json.loads(folder.run("evaluate", planned, folder.out, "--json").stdout)
    keys = ("cost", "batch_tokens", "batch_kind", "phase")
    assert score["pricing"] == {key: own[key] for key in keys}
    assert score["pricing"]["cost"]["rank_speeds"] == [1, 1, 0.5, 0.25]
    certified = folder.run(
        "certify", planned, folder.out, "--time-limit", 1, "--json", "--quiet"
    )
    proof = json.loads(certified.stdout)
    assert proof["pricing"] == score["pricing"]
    assert proof["value"] == score["batch_seconds_mean"]


def test_what_is_said_otherwise_counts_and_is_told(folder, planned):
    command = ("evaluate", planned, folder.out)
    shown = " ".join(folder.run(*command).stdout.split())
    assert f"priced as {folder.out} was planned: wire per_expert" in shown
    assert f"rank speeds {SPEEDS}" in shown
    other = ("--rank-speeds", "", "--hardware", "h100")
    shown = " ".join(folder.run(*command, *other).stdout.split())
    assert "hardware h100, rank speeds alike" in shown
    assert f"was planned with hardware h200, rank speeds {SPEEDS}" in shown
    (score,) = json.loads(folder.run(*command, *other, "--json").stdout)
    assert score["pricing"]["cost"]["rank_speeds"] == []
    assert score["pricing"]["batch_tokens"] == 100  # still the plan's


def test_a_report_of_a_plan_with_slow_ranks_is_the_plans_own(folder, ids):
    """Files used to lose the speeds: the report scored them with equal ranks."""
    trace = folder.trace(ids)
    speeds = ("--rank-speeds", SPEEDS)
    scored = folder.plan_json(trace, *speeds)
    pages = [folder.path / "one.html", folder.path / "two.html"]
    for page, more in zip(pages, ((), speeds), strict=True):
        result = folder.run("report", trace, folder.out, "--out", page, *more)
        assert result.exit_code == 0, result.stderr
        assert f"rank speeds {SPEEDS}" in result.stdout
    assert pages[0].read_text() == pages[1].read_text()
    seconds = scored["placements"][-1]["batch_seconds_mean"] * 1e3
    assert f"{seconds:.3f}" in pages[0].read_text()


def test_scores_of_tokens_that_were_planned_on_come_with_a_warning(folder, ids):
    trace = folder.trace(ids)
    folder.plan(trace)
    said = "was planned on tokens of this trace"
    assert said in folder.run("evaluate", trace, folder.out).stderr
    other = folder.trace(ids[::-1].copy(), name="other.safetensors")
    assert said not in folder.run("evaluate", other, folder.out).stderr


def test_an_engines_placement_is_priced_by_the_defaults(folder, ids):
    trace = folder.trace(ids)
    folder.plan(trace)
    placement = read_placement(folder.out)
    bare = dataclasses.replace(placement, provenance=Provenance(solver="sglang"))
    write_placement(bare, folder.out)
    result = folder.run("evaluate", trace, folder.out)
    assert "priced with wire dedup, homes uniform, hardware h100" in result.stdout
    assert "is not in the table" in result.stderr


def test_counts_are_priced_by_loads_whatever_the_plan_was(folder, ids):
    folder.plan(folder.trace(ids))
    load = np.stack([np.bincount(ids[:, i].ravel(), minlength=16) for i in range(3)])
    np.savez(folder.path / "counts.npz", counts=load[None].repeat(2, axis=0))
    result = folder.run("evaluate", folder.path / "counts.npz", folder.out)
    assert result.exit_code == 0, result.stderr
    assert "wire allgather" in result.stdout
    assert "was planned with wire dedup" in result.stdout


def test_a_placement_that_tells_nonsense_is_refused(folder, planned):
    content = json.loads(folder.out.read_text())
    content["provenance"]["options"]["cost"]["homes"] = "away"
    folder.out.write_text(json.dumps(content))
    result = folder.run("evaluate", planned, folder.out)
    assert result.exit_code == 2
    assert "cost.homes: wanted Homes, got 'away'" in result.stderr


def test_a_machine_of_ones_own_prices_a_plan_and_is_kept_in_its_file(folder, ids):
    """Nothing is lost with the file: the placement has all figures."""
    mine = dataclasses.replace(
        HARDWARE["l40s"],
        name="mine",
        ranks_per_node=2,
        rank_bandwidth=Bandwidth(egress=(20e9,), ingress=(20e9, 10e9)),
        node_latency=Latency(base=1e-5, per_rank=1e-6),
    )
    file = folder.path / "mine.toml"
    write_hardware(mine, file)
    trace = folder.trace(ids)
    scored = folder.plan_json(trace, "--hardware", file, "--network", "ethernet-25")
    file.unlink()
    placement = read_placement(folder.out)
    assert placement.topology.ranks_per_node == 2  # full nodes of this machine
    own = options_of(placement).cost.hardware
    assert own == with_network(mine, NETWORKS["ethernet-25"])
    assert own.network == "ethernet-25"
    (score,) = json.loads(folder.run("evaluate", trace, folder.out, "--json").stdout)
    assert score["pricing"]["cost"]["hardware"]["name"] == "mine"
    assert scored["placements"][-1]["name"] == "lpt"
    shown = " ".join(folder.run("evaluate", trace, folder.out).stdout.split())
    assert "hardware mine, rank speeds alike, network ethernet-25" in shown


def test_slower_networks_cost_more(folder, ids):
    trace = folder.trace(ids)
    folder.plan(trace, "--ranks-per-node", 2)

    def seconds(*options):
        command = ("evaluate", trace, folder.out, "--json", *options)
        return json.loads(folder.run(*command).stdout)[0]["batch_seconds_mean"]

    networks = ("infiniband-ndr", "ethernet-100", "ethernet-25")
    times = [seconds("--network", name) for name in networks]
    assert times == sorted(times)
    assert times[0] == seconds() < times[1] < times[2]


def test_known_machines_and_networks_are_printed_as_files_to_begin_with(folder):
    for known, read in ((HARDWARE, read_hardware), (NETWORKS, read_network)):
        for name in known:
            path = folder.path / "copy.toml"
            path.write_text(folder.run("hardware", name).stdout)
            assert read(path) == known[name]
    shown = folder.run("hardware", folder.path / "missing.toml")
    assert shown.exit_code == 2
    assert "missing.toml" in shown.stderr
    odd = folder.run("hardware", "abacus")
    assert odd.exit_code == 2
    assert "gb200-nvl72" in odd.stderr
