"""The benchmark of whole models, tiny: every exchange under every placement."""

import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import ANY

import pytest

pytest.importorskip("torch", reason="torch is not installed")

from ranks import run_on_ranks

FOLDER = Path(__file__).parents[2] / "benchmarks" / "end_to_end"
EXAMPLE = Path(__file__).parents[2] / "examples" / "train_demo_model"
NOT_PERMITTED = 3
SIZES = {
    **{"layers": 3, "narrow": 8, "ranks": 4, "ranks-per-node": 2, "gbit": 2},
    **{"sequences": 2, "prompt": 12, "decode": 2, "batches": 2},
    **{"seconds": 0.5, "dtype": "float32"},
}
PLACEMENTS = ("contiguous", "lpt, chain", "eplb + replicas", "joint for follow")
RECORDED = {  # real routing, where there is any on this machine
    "deepseek-v2-lite": {"narrow": 64},
    "mixtral-8x7b": {"narrow": 64},
}


ASKED = SimpleNamespace(seconds=0.5, seed=0, threads=1, spare=2)


def run(script, *arguments):
    return subprocess.run(
        [sys.executable, str(FOLDER / script), *map(str, arguments)],
        capture_output=True,
        text=True,
        check=False,
    )


def plan(out, **changes):
    sizes = SIZES | changes
    options = [f"--{name}={value}" for name, value in sizes.items()]
    options += [f"--placement={name}" for name in PLACEMENTS]
    done = run("plan.py", *options, f"--out={out}")
    assert done.returncode == 0, done.stderr
    return out


def run_case_here(rank, num_ranks, case, out):
    """What `rank.py` does in a group that is there already."""
    sys.path.insert(0, str(FOLDER))
    import torch
    import torch.distributed as dist
    from case import read_case
    from place import Place
    from rank import run_case, write

    options = SimpleNamespace(repeats=2, seconds=60, parts=1, only=None)
    options.weights = options.text = None
    options.out, options.backend = out, "gloo"
    place = Place(device=torch.device("cpu"), control=dist.group.WORLD)
    with torch.no_grad():
        found = [run_case(read_case(case), options, place)]
    if rank == 0:
        write(options, found, place, {})


@pytest.fixture(scope="module")
def planned(tmp_path_factory):
    """A case that tests read, and leave as it is."""
    return plan(tmp_path_factory.mktemp("planned") / "case")


@pytest.fixture
def results(planned, tmp_path):
    case, out = planned, tmp_path / "results.json"
    run_on_ranks(4, run_case_here, case, out)
    return json.loads(out.read_text()), out


def test_every_exchange_under_every_placement(results):
    """The run itself ends where outputs differ or rows are not those predicted."""
    content, out = results
    (case,) = content["cases"]
    assert set(case["case"]["told"]) == set(PLACEMENTS)
    found = {result["variant"]: result for result in case["results"]}
    assert {"ours: eplb + replicas", "ours, follow: joint for follow"} <= found.keys()
    for result in found.values():
        assert result["difference"] < 1e-4
        assert len(result["prefill_ms"]) == len(result["decode_ms"]) == 2
        assert all(len(steps) == SIZES["decode"] for steps in result["decode_ms"])
        assert result["said"]["prefill"]["step"] > 0
        assert len(result["parts"]["decode"]) == SIZES["decode"]
    base = found["all-to-all per expert: contiguous"]
    ours = found["ours: contiguous"]
    assert ours["prefill"]["out_of_nodes"] < base["prefill"]["out_of_nodes"]
    done = run("table.py", out)
    assert done.returncode == 0, done.stderr
    for name in found:
        assert f"| {name} |" in done.stdout
    assert "- prefill, ours: joint" not in done.stdout  # it was not planned
    for heading in ("| ablation |", "| as printed, Mixtral-8x7B, two nodes |"):
        assert heading in done.stdout


def test_plans_are_made_anew_for_another_network(planned, tmp_path):
    """Of the case alone: no recording is read, and what knows no prices stays."""
    import moetuner
    import numpy as np

    before, after = planned, tmp_path / "after"
    moetuner.write_hardware(moetuner.HARDWARE["h100"], tmp_path / "measured.toml")
    more = ["--gbit=40", "--measured", f"--hardware={tmp_path / 'measured.toml'}"]
    more += ["--placement=joint for follow", "--seconds=0.5", f"--out={after}"]
    done = run("replan.py", before, *more)
    assert done.returncode == 0, done.stderr
    old, new = (json.loads((f / "case.json").read_text()) for f in (before, after))
    assert new["command"].startswith(old["command"] + "; python ")
    assert (old["hardware"], new["hardware"]) == ("h200", "h100")
    assert (old["network"], old["gbit"]) == ("2 Gbit/s a node", 2)
    assert (new["network"], new["gbit"]) == ("", 40), "its links are the file's own"
    changed = {"command", "hardware", "network", "gbit"}
    for about in (old, new):
        about["told"]["joint for follow"] = "after some time"
    assert {name for name in old if old[name] != new[name]} == changed
    assert sorted(f.name for f in before.iterdir()) == sorted(
        f.name for f in after.iterdir()
    )
    for name in ("contiguous.json", "lpt-chain.json", "eplb-with-replicas.json"):
        assert (before / name).read_bytes() == (after / name).read_bytes()
    for name in ("replayed.safetensors", "planned.safetensors"):
        traces = [moetuner.read_trace(folder / name) for folder in (before, after)]
        assert np.array_equal(traces[0].topk_ids, traces[1].topk_ids)


def test_a_search_starts_at_the_placement_that_is_there(planned, monkeypatch):
    monkeypatch.syspath_prepend(str(FOLDER))
    import plans
    from case import PLANNED, read_case
    from moetuner import read_trace

    case, starts = read_case(planned), []
    given = case.placements["joint for follow"]

    class Keeps:
        def solve(self, *_, warm_start):
            starts.append(warm_start)
            status = SimpleNamespace(value="kept")
            return SimpleNamespace(placement=warm_start, status=status)

    monkeypatch.setattr(plans, "get_solver", lambda _: Keeps())
    trace = read_trace(planned / PLANNED)
    asked = plans.Asked.of(case, trace, ASKED)
    plans.plan_all(["joint for follow"], asked, case)
    assert starts == [given]
    assert case.placements["joint for follow"] is given


def test_as_many_slots_as_asked_for_and_several_at_once(planned, monkeypatch):
    """Those to spare are for planners of replicas; a search keeps those there are."""
    monkeypatch.syspath_prepend(str(FOLDER))
    import plans
    from case import PLANNED, read_case
    from moetuner import read_trace

    case, names = read_case(planned), ["lpt", "eplb + replicas", "joint + replicas"]
    del case.placements["eplb + replicas"]
    asked = plans.Asked.of(case, read_trace(planned / PLANNED), ASKED)
    plans.plan_all(names, asked, case, jobs=2)
    own = case.placements["contiguous"].slots_per_rank
    slots = [case.placements[name].slots_per_rank - own for name in names]
    assert slots == [0, 2, 2]
    fewer = plans.Asked.of(
        case, asked.trace, SimpleNamespace(**vars(ASKED) | {"spare": 1})
    )
    plans.plan_all(names[2:], fewer, case)
    assert case.placements["joint + replicas"].slots_per_rank == own + 2


def test_wrong_rows_end_the_run(planned):
    """A placement that is not the one whose rows are predicted."""
    with pytest.raises(pytest.fail.Exception, match="rows are not those predicted"):
        run_on_ranks(4, miscount, planned)


def miscount(rank, num_ranks, case):
    sys.path.insert(0, str(FOLDER))
    import told

    told.predict = lambda *_: 0 * predict(*_)
    from moetuner.evaluation.verify import predict

    run_case_here(rank, num_ranks, case, None)


def keep_demo_model(rank, num_ranks, folder):
    """Random weights of the demo model, as its training keeps them, and a text."""
    import numpy as np
    import torch

    sys.path.insert(0, str(EXAMPLE))
    from model import DemoModel
    from train import TINY

    torch.manual_seed(1)
    model = DemoModel(TINY)
    kept = {"config": vars(TINY), "weights": model.state_dict()}
    torch.save(kept, folder / "weights.pt")
    text = np.random.default_rng(0).integers(0, 256, 4000).astype(np.uint8)
    np.savez(folder / "corpus.npz", **{"held_out/noise": text, "train/none": text[:9]})


def record_demo(folder):
    """Routing that has its sizes, to plan on."""
    import moetuner
    import numpy as np

    ids = np.random.default_rng(0).permuted(np.tile(np.arange(8), (64, 2, 1)), axis=2)
    trace = moetuner.Trace(
        topk_ids=np.ascontiguousarray(ids[:, :, :2], np.int16),
        num_experts=8,
        layer_ids=np.arange(2, dtype=np.int32),
        sequence=np.repeat(np.arange(8, dtype=np.int32), 8),
        ranked=True,
    )
    moetuner.write_trace(trace, folder / "trace.safetensors")


def read_text(rank, num_ranks, folder):
    """Every variant must say what the whole model says on one process."""
    sys.path.insert(0, str(FOLDER))
    import torch
    import torch.distributed as dist
    from bench import Bench
    from case import read_case
    from feeds import Text
    from place import Place
    from rehearsal import rehearse
    from trained import TrainedExperts
    from variants import runnable

    place = Place(device=torch.device("cpu"), control=dist.group.WORLD)
    case = read_case(folder / "case")
    trained = TrainedExperts(folder / "weights.pt")
    text = Text(case, folder / "corpus.npz")
    wanted = runnable(case)
    with torch.no_grad():
        found = rehearse(Bench(case, wanted, place, trained, text))
        tokens = text.tokens(0, -1, rank)
        model = demo_model_of(folder)
        for step in range(SIZES["decode"] + 1):
            whole = model(tokens)[0][:, -1]
            torch.testing.assert_close(found[0].outputs[step], whole)
            if step < SIZES["decode"]:
                tokens = torch.cat([tokens, text.tokens(0, step, rank)], dim=1)
    assert all(one.difference < 1e-5 for one in found), "and all others say the same"
    ours = [one for one in found if one.traces]
    assert len(ours) == 3, "predicted and counted rows of ours were compared"


def demo_model_of(folder):
    import torch

    sys.path.insert(0, str(EXAMPLE))
    from model import DemoModel, ModelConfig

    kept = torch.load(folder / "weights.pt", weights_only=True)
    model = DemoModel(ModelConfig(**kept["config"]))
    model.load_state_dict(kept["weights"])
    return model


def test_a_trained_model_reads_text_and_routes_by_itself(tmp_path):
    run_on_ranks(1, keep_demo_model, tmp_path)
    record_demo(tmp_path)
    plan(
        tmp_path / "case",
        **{"layers": 0, "narrow": 1, "weights": tmp_path / "weights.pt"},
        recording=tmp_path / "trace.safetensors",
    )
    run_on_ranks(4, read_text, tmp_path)


@pytest.mark.parametrize("model", RECORDED)
def test_recordings_of_real_models_can_be_planned(model, traces_dir, tmp_path):
    case = plan(tmp_path / "case", model=model, **RECORDED[model])
    said = json.loads((case / "case.json").read_text())
    assert said["family"]["name"] == model
    assert said["layers"] == SIZES["layers"]
    assert str(traces_dir) not in (case / "case.json").read_text()


def see_runnable(rank, num_ranks, folder):
    sys.path.insert(0, str(FOLDER))
    from case import read_case
    from variants import runnable

    case = read_case(folder)
    assert "first" in case.told["joint for follow"]
    names = [variant.name for variant in runnable(case)]
    assert "ours: contiguous" in names
    assert not [name for name in names if "follow" in name]
    (one,) = runnable(case, ["all-gather: con"])
    assert one.name == "all-gather: contiguous"


def test_no_token_follows_an_expert_that_nobody_knows(tmp_path):
    import dataclasses

    import moetuner

    demo = moetuner.demo_trace()
    unranked = dataclasses.replace(demo, ranked=False, topk_weights=None)
    moetuner.write_trace(unranked, tmp_path / "trace.safetensors")
    case = plan(tmp_path / "case", recording=tmp_path / "trace.safetensors")
    run_on_ranks(1, see_runnable, case)


def test_another_models_recording_is_refused(tmp_path):
    import moetuner

    file = tmp_path / "trace.safetensors"
    moetuner.write_trace(moetuner.demo_trace(), file)
    done = run(
        *("plan.py", "--model=gpt-oss-20b", f"--recording={file}"),
        f"--out={tmp_path / 'case'}",
    )
    assert done.returncode == 1
    assert "gpt-oss-20b has 32 experts and takes 4" in done.stderr


@pytest.mark.slow
def test_two_nodes(planned, tmp_path):
    """Between namespaces: the kernel's bytes are those of the rows, and headers."""
    case, out = planned, tmp_path / "results.json"
    environment = ["--device=cpu", "--backend=gloo", "--repeats=1", "--parts=1"]
    done = run("two_nodes.py", case, *environment, f"--out={out}")
    if done.returncode == NOT_PERMITTED:
        pytest.skip(done.stderr.strip())
    assert done.returncode == 0, done.stderr
    (found,) = json.loads(out.read_text())["cases"]
    for result in found["results"]:
        sent, payload = (result["prefill"][f"{x}_bytes"] for x in ("link", "node"))
        assert sent > 0
        assert result["lost"] == [{"dropped": 0, "sent_again": ANY, "timeouts": ANY}]
        if payload:
            assert payload < sent < 1.5 * payload, result["variant"]
