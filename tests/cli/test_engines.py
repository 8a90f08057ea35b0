"""import, export, import-placement: what they print, and how they fail."""

import dataclasses
import json

import numpy as np
import pytest
from engine_files import FOLDER
from moetuner.cli.engines import parse_layers
from moetuner.errors import InvalidTraceError
from moetuner.export import fill_slots
from moetuner.placement.file import read_placement, write_placement
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
    assert "note: layer 0 holds no routing: taken as dense" in done.stderr
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
         "say --ranks"),
        (["import-placement", FOLDER / "README.md", "-o", "out"], "no placement file"),
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


def test_counts_without_top_k_are_choices_until_it_is_told(folder, rng):
    """describe, plan and import take it; nobody guesses it."""
    counts = np.zeros((10, 4, 16), int)
    chances = rng.dirichlet(np.ones(16), 3)
    counts[:, 1:] = [[rng.multinomial(4000, p) for p in chances] for _ in range(10)]
    archive = folder.path / "a.npz"
    np.savez(archive, counts=counts)
    said = folder.run("describe", archive).stdout
    assert "unknown: 40,000 choices of experts a layer in 10 sequences" in said
    assert "3: 1..3" in said
    assert "16, top-k unknown" in said
    assert json.loads(folder.run("describe", archive, "--json").stdout)["top_k"] is None
    said = folder.run("describe", archive, "--top-k", 4).stdout
    assert "10,000 in 10 sequences" in said
    assert "16, top-4" in said
    done = folder.plan(archive, "--top-k", 4, solver="lpt")
    assert done.exit_code == 0
    assert "planned on 5,000 tokens, scored on 5,000 others" in done.stdout
    assert "--top-k says it" not in done.stderr
    assert "--top-k says it" in folder.plan(archive, solver="lpt").stderr
    out = folder.path / "t"
    done = folder.run("import", archive, "-o", out)
    assert "npz: 40,000 choices of experts a layer, 3 layers" in done.stdout
    done = folder.run("import", archive, "-o", out, "--top-k", 4)
    assert "npz: 10,000 tokens, 3 layers of 16 experts" in done.stdout
    refused = folder.run("describe", out, "--top-k", 2)
    assert refused.exit_code == 2
    assert "says 4 experts per token" in refused.stderr


def test_describe_names_unused_experts_and_hints(folder, rng):
    ids = np.argsort(rng.random((300, 2, 8)))[..., :3]
    ids[:, 1][ids[:, 1] == 5] = 8
    ids = np.concatenate([ids, np.full((300, 2, 1), 9)], axis=2)
    np.savez(folder.path / "a.npz", experts=ids.astype(np.int16), layer_ids=[3, 7])
    said = folder.run("describe", folder.path / "a.npz").stdout
    assert "2 of 20: 1 at layer 3, 1 at layer 7" in said
    assert "every token has expert 9 at 2 layers" in said


def test_a_single_matrix_is_planned_whole(folder, rng):
    np.save(folder.path / "a.npy", rng.integers(1, 200, (2, 16)))
    trace = folder.path / "t"
    assert folder.run("import", folder.path / "a.npy", "-o", trace).exit_code == 0
    done = folder.plan(trace, "--json", solver="lpt")
    assert done.exit_code == 0
    assert json.loads(done.stdout)["held_out"] is False
    assert "nothing was held out" in folder.plan(trace, solver="lpt").stdout


def test_partial_placements_are_completed_by_name(folder):
    plan = json.loads((FOLDER / "placement.json").read_text())
    plan["layers"] = dict(zip(("2", "3", "9"), plan["layers"].values(), strict=True))
    path = folder.path / "p.json"
    path.write_text(json.dumps(plan))
    command = ("export", path, "--to", "vllm", "-o", folder.path / "v.json")
    refused = folder.run(*command)
    assert refused.exit_code == 2
    assert "only layers 2-3, 9" in refused.stderr
    done = folder.run(*command, "--num-layers", 12)
    assert "layers 0-1, 4-8, 10-11 are not in the placement" in done.stderr
    assert len(json.loads((folder.path / "v.json").read_text())) == 12
    done = folder.run(*command, "--moe-layers", "2-4,9")
    assert "layer 4 is not in the placement" in done.stderr
    assert len(json.loads((folder.path / "v.json").read_text())) == 4


def test_replicas_in_empty_slots_are_as_large_as_planned(folder, ids):
    """512 x 512 in FP8, a byte and its scale: 16 replicas more in each of 3 layers."""
    trace, out = folder.trace(ids), folder.path / "map.json"
    sizes = ("--hidden-size", 512, "--expert-hidden-size", 512, "--weights", "fp8")
    planned = folder.plan(trace, "--slots-per-rank", 8, *sizes)
    assert planned.exit_code == 0, planned.stderr
    exported = folder.run(*("export", folder.out, "--to", "vllm-ascend", "-o", out))
    weights = 3 * 16 * 3 * 512 * 512 * (1 + 4 / 128**2)
    said = f"48 empty slots hold replicas now: {weights / 2**30:.2f} GiB over all"
    assert said in " ".join(exported.stdout.split()), exported.stderr


def test_the_replica_rule_of_a_plan_goes_with_it(folder, ids):
    """Planned for vLLM: priced so again, and pointed out for another engine."""
    trace = folder.trace(ids)
    result = folder.plan(
        *(trace, "--slots-per-rank", 5, "--replica-rule", "vllm", "--split", 1),
        *("--batch-tokens", 256, "--batch-kind", "mixed", "--prove", 0),
        *("--hidden-size", 64, "--expert-hidden-size", 2**20),
        solver="joint",
    )
    assert result.exit_code == 0, result.stderr
    shown = " ".join(result.stdout.split())
    assert "slots are empty: no replica tried there pays" in shown
    cost = json.loads(folder.out.read_text())["provenance"]["options"]["cost"]
    assert cost["replica_rule"] == "vllm"

    shown = " ".join(folder.run("evaluate", trace, folder.out).stdout.split())
    assert "replica rule vllm" in shown
    other = ("--replica-rule", "sglang-static")
    shown = " ".join(folder.run("evaluate", trace, folder.out, *other).stdout.split())
    assert "replica rule sglang-static" in shown
    assert "was planned with replica rule vllm" in shown

    plan = read_placement(folder.out)
    slots = fill_slots(plan, load=np.ones((3, 16))).slots
    write_placement(dataclasses.replace(plan, slot_experts=slots), folder.out)
    for engine, warns in (("vllm", False), ("trtllm", True)):
        out = folder.path / f"map.{engine}"
        result = folder.run("export", folder.out, "--to", engine, "-o", out)
        assert result.exit_code == 0, result.stderr
        told = "plan again with --replica-rule tensorrt-llm"
        assert (told in " ".join(result.stderr.split())) == warns
