"""import, export, import-placement: what they print, and how they fail."""

import json

import numpy as np
import pytest
from engine_files import FOLDER
from moetuner.cli.engines import parse_layers
from moetuner.errors import InvalidTraceError
from moetuner.placement.file import read_placement
from moetuner.trace import CountTrace, read_trace

NAMES = {
    "sglang": "sglang.json",
    "trtllm": "trtllm.yaml",
    "vllm-ascend": "vllm_ascend.json",
    "vllm": "vllm.json",
    "eplb": "eplb.safetensors",
}


def test_recording_to_engine(folder):
    """The way of a serving engineer: record, import, plan, export."""
    trace, out = folder.path / "trace.safetensors", folder.path / "sglang.json"
    done = folder.run(
        *("import", FOLDER / "vllm/responses.jsonl", "-o", trace),
        *("--model", "gpt-oss-20b", "--num-experts", 64),
    )
    assert done.exit_code == 0, done.stderr
    assert "routed-responses: 48 tokens, 3 layers of 64 experts" in done.stdout
    assert "note: layers [0] hold no routing: taken as dense" in done.stderr
    assert read_trace(trace).metadata.model == "gpt-oss-20b"
    done = folder.plan(trace, "--slots-per-rank", 17)
    assert done.exit_code == 0, done.stderr
    done = folder.run(
        *("export", folder.out, "--to", "sglang", "-o", out, "--num-layers", 24),
        *("--trace", trace),
    )
    assert done.exit_code == 0, done.stderr
    assert "12 empty slots hold replicas now: 0.56 GiB over all ranks" in done.stdout
    assert "--ep-num-redundant-experts 4" in done.stdout
    assert f"--init-expert-location {out}" in done.stdout
    assert "--moe-a2a-backend none" in done.stderr
    rows = json.loads(out.read_text())["physical_to_logical_map"]
    assert np.array(rows).shape == (24, 68)


def test_counts_say_so_and_solvers_refuse_by_name(folder):
    trace = folder.path / "trace.safetensors"
    done = folder.run("import", FOLDER / "trtllm_counts", "-o", trace)
    assert done.exit_code == 0, done.stderr
    assert "counts only, no coactivation and no transitions" in done.stdout
    assert isinstance(read_trace(trace), CountTrace)
    assert folder.plan(trace, solver="lpt").exit_code == 0
    for solver in ("ilp2", "chain"):
        refused = folder.plan(trace, solver=solver)
        assert refused.exit_code == 2
        assert f"{solver} needs layer-to-layer transitions" in refused.stderr
    described = folder.run("describe", trace)
    assert "coactivation, transitions" in described.stdout


@pytest.mark.parametrize("engine", NAMES)
def test_there_and_back(folder, engine):
    given = FOLDER / "exports" / NAMES[engine]
    if engine == "trtllm":
        pytest.importorskip("yaml")
    imported = folder.path / "placement.json"
    ranks = () if engine == "vllm-ascend" else ("--ranks", 4)
    done = folder.run(
        *("import-placement", given, "-o", imported, "--layers", "1-3", *ranks),
        *("--ranks-per-node", 2),
    )
    assert done.exit_code == 0, done.stderr
    assert "3 layers, 64 experts in 72 slots of 4 ranks" in done.stdout
    ours = read_placement(FOLDER / "placement.json")
    placement = read_placement(imported)
    assert np.array_equal(placement.slot_experts, ours.slot_experts)
    assert placement.topology == ours.topology
    again = folder.path / "again"
    done = folder.run(
        "export", imported, "--to", engine, "-o", again, "--num-layers", 4
    )
    assert done.exit_code == 0, done.stderr
    assert again.read_bytes() == given.read_bytes()


def test_an_imported_placement_is_scored(folder):
    """Somebody else's plan beside ours, on our trace."""
    trace, theirs = folder.path / "t.safetensors", folder.path / "theirs.json"
    folder.run("import", FOLDER / "vllm/responses.jsonl", "-o", trace)
    folder.run(
        *("import-placement", FOLDER / "eplb/rebalanced.safetensors", "-o", theirs),
        *("--ranks", 4, "--layers", "1-3"),
    )
    done = folder.run(
        "evaluate", trace, theirs, FOLDER / "placement.json", "--json", "-q"
    )
    assert done.exit_code == 0, done.stderr
    assert len(json.loads(done.stdout)) == 2


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["import", "nowhere", "-o", "out"], "nowhere: No such file"),
        (["import", FOLDER / "load.npy", "-o", "nowhere/out"], "cannot write there"),
        (["import", FOLDER / "load.npy", "-o", "out", "--layers", "x"], "wanted num"),
        (["import", FOLDER / "load.npy", "-o", "out", "--format", "npz"], "damaged"),
        (["export", FOLDER / "placement.json", "--to", "sglang", "-o", "out"],
         "--num-layers"),
        (["export", FOLDER / "placement.json", "--to", "vllm", "-o", "out",
          "--pull-request", 1], "must be one of"),
        (["export", FOLDER / "load.npy", "--to", "eplb", "-o", "out"], "not JSON"),
        (["import-placement", FOLDER / "exports/sglang.json", "-o", "out"],
         "say num_ranks (--ranks)"),
        (["import-placement", FOLDER / "load.npy", "-o", "out"], "no placement file"),
        (["import-placement", FOLDER / "exports/sglang.json", "-o", "out", "--ranks", 4,
          "--layers", "5-3"], "'5-3' holds no layer"),
    ],
)  # fmt: skip
def test_failures_say_why_and_write_nothing(folder, monkeypatch, arguments, message):
    monkeypatch.chdir(folder.path)
    done = folder.run(*arguments)
    assert done.exit_code == 2
    assert message in done.stderr
    assert done.stderr.startswith("error: ")
    assert not (folder.path / "out").exists()


def test_inputs_are_not_overwritten(folder):
    path = folder.path / "a.npy"
    np.save(path, np.ones((2, 3)))
    before = path.read_bytes()
    assert "that is the recording" in folder.run("import", path, "-o", path).stderr
    plan = folder.path / "p.json"
    plan.write_bytes((FOLDER / "placement.json").read_bytes())
    done = folder.run("export", plan, "--to", "eplb", "-o", plan)
    assert "that is the placement" in done.stderr
    done = folder.run("import-placement", plan, "-o", plan)
    assert "that is the engine's file" in done.stderr
    assert path.read_bytes() == before


def test_a_trace_of_other_layers_is_no_load(folder, ids):
    done = folder.run(
        *("export", FOLDER / "placement.json", "--to", "eplb"),
        *("-o", folder.path / "e", "--trace", folder.trace(ids)),
    )
    assert done.exit_code == 2
    assert "other layers or experts" in done.stderr


def test_layers_are_written_in_two_ways():
    assert parse_layers("3-6") == (3, 4, 5, 6)
    assert parse_layers("1, 3,5-7") == (1, 3, 5, 6, 7)
    for text in ("", "a", "3-", "-3", "1,,2", "1-2-3", "3-1", "٣", "100000"):
        with pytest.raises(InvalidTraceError, match="--layers"):
            parse_layers(text)
