"""Files for engines, written, read back, and those that engines wrote themselves."""

import dataclasses
import json
import runpy
import shlex

import numpy as np
import pytest
from engine_files import FOLDER
from hypothesis import given
from hypothesis import strategies as st
from moetuner.errors import InvalidPlacementError, MissingDependencyError
from moetuner.export import (
    Engine,
    ExportOptions,
    ReadOptions,
    detect_engine,
    export_placement,
    fill_slots,
    read_engine_placement,
)
from moetuner.export.base import to_placement
from moetuner.placement.file import read_placement
from moetuner.placement.model import EMPTY, Placement
from moetuner.placement.topology import Topology
from safetensors.numpy import load_file, save_file
from strategies import random_placement, topologies, traces

LAYERS = ExportOptions(num_layers=4)  # of which the fixture's 1 and 3 have experts
NAMES = {
    Engine.SGLANG: "sglang.json",
    Engine.TRTLLM: "trtllm.yaml",
    Engine.VLLM_ASCEND: "vllm_ascend.json",
    Engine.VLLM: "vllm.json",
    Engine.EPLB: "eplb.safetensors",
}


@pytest.mark.parametrize("engine", NAMES)
def test_the_files_that_the_engines_took_are_still_what_is_written(
    full, tmp_path, engine
):
    """Their own code has read these very bytes: see the scripts beside them."""
    options = ExportOptions(num_layers=4)
    export_placement(full, tmp_path / "out", engine, options=options)
    written = (tmp_path / "out").read_bytes()
    assert written == (FOLDER / "exports" / NAMES[engine]).read_bytes()


def test_the_script_that_feeds_the_engines_still_runs(tmp_path):
    runpy.run_path(str(FOLDER / "make_placements.py"))["main"](tmp_path)
    written = sorted(p.relative_to(tmp_path) for p in tmp_path.rglob("*.*"))
    assert len(written) == len(NAMES) + 1
    for name in written:
        assert (tmp_path / name).read_bytes() == (FOLDER / name).read_bytes()


@pytest.mark.parametrize("engine", [e for e in Engine if e is not Engine.DEEPEP])
@given(traces(max_tokens=0), topologies, st.integers(0, 2), st.data())
def test_round_trip(tmp_path_factory, engine, trace, topology, extra, data):
    """What comes back is the placement with its empty slots filled, no more."""
    if engine is Engine.VLLM_START_MAP:
        pytest.importorskip("torch")
    path = tmp_path_factory.getbasetemp() / "round-trip"
    rng = np.random.default_rng(data.draw(st.integers(0, 99)))
    plan = random_placement(rng, trace, topology, extra)
    repeats = engine is not Engine.VLLM_ASCEND
    if not repeats and plan.slots_per_rank > plan.num_experts:
        return
    first = data.draw(st.integers(0, 2))
    plan = dataclasses.replace(plan, layer_ids=(plan.layer_ids + first).astype("i4"))
    layers = tuple(plan.layer_ids.tolist())
    exported = export_placement(
        plan, path, engine, options=ExportOptions(num_layers=layers[-1] + 2)
    )
    assert exported.num_replicas == (plan.slot_experts == EMPTY).sum()
    assert detect_engine(path) is engine
    read = read_engine_placement(
        path,
        options=ReadOptions(
            num_ranks=topology.num_ranks,
            ranks_per_node=topology.ranks_per_node,
            layers=layers,
        ),
    )
    assert read.topology == topology
    assert read.layer_ids.tolist() == list(layers)
    filled = fill_slots(plan, repeats=repeats).slots
    shape = (plan.num_layers, topology.num_ranks, -1)
    for mine, theirs, planned in zip(
        filled.reshape(shape).reshape(-1, plan.slots_per_rank),
        read.slot_experts.reshape(-1, plan.slots_per_rank),
        plan.slot_experts.reshape(-1, plan.slots_per_rank),
        strict=True,
    ):
        assert set(theirs.tolist()) - {EMPTY} == set(mine.tolist())
        kept = set(planned.tolist()) - {EMPTY}
        assert kept <= set(theirs.tolist())
        if repeats and kept:
            assert set(theirs.tolist()) - {EMPTY} == kept


def test_sglang_has_one_key_and_a_row_for_every_layer(placement, tmp_path):
    path = tmp_path / "s.json"
    options = ExportOptions(num_layers=5)
    export_placement(placement, path, Engine.SGLANG, options=options)
    content = json.loads(path.read_text())
    assert list(content) == ["physical_to_logical_map"]
    rows = content["physical_to_logical_map"]
    identity = [0, 1, 2, 3, 0, 1]
    assert rows[0] == rows[2] == rows[4] == identity
    assert [rows[1], rows[3]] == fill_slots(placement).slots.tolist()
    for wrong, message in ((None, "`num_layers`"), (3, "has layer 3"), (10**6, "is")):
        with pytest.raises(InvalidPlacementError, match=message):
            options = ExportOptions(num_layers=wrong)
            export_placement(placement, path, Engine.SGLANG, options=options)


def test_trtllm_has_three_keys_and_real_layer_numbers(placement, tmp_path):
    yaml = pytest.importorskip("yaml")
    path = tmp_path / "t.yaml"
    export_placement(placement, path, Engine.TRTLLM, options=LAYERS)
    slots = fill_slots(placement).slots.tolist()
    assert yaml.safe_load(path.read_text()) == {
        "num_slots": 6,
        "initial_global_assignments": {1: slots[0], 3: slots[1]},
        "layer_updates_per_iter": 0,
    }


def test_vllm_formats_of_each_proposal(placement, full, tmp_path):
    path = tmp_path / "v.json"
    for number, key in ((49572, "initial_expert_map_path"), (53022, "expert_map_path")):
        options = dataclasses.replace(LAYERS, pull_request=number)
        exported = export_placement(placement, path, Engine.VLLM, options=options)
        assert json.loads(path.read_text()) == fill_slots(placement).slots.tolist()
        assert key in exported.command
        assert "experimental" in exported.notes[0]
        assert str(number) in exported.notes[0]
    options = ExportOptions(pull_request=34811)
    with pytest.raises(InvalidPlacementError, match="replicas"):
        export_placement(placement, path, Engine.VLLM, options=options)
    ranks = np.array([[0, 1, 1, 0]] * 2)
    topology = Topology(num_ranks=2, ranks_per_node=2)
    layer_ids = np.array([0, 1], np.int32)
    plan = Placement.from_rank_of(ranks, layer_ids=layer_ids, topology=topology)
    export_placement(plan, path, Engine.VLLM, options=options)
    assert json.loads(path.read_text()) == {"expert_to_ep_rank": [0, 1, 1, 0]}
    assert read_engine_placement(path).rank_of().tolist() == [[0, 1, 1, 0]]
    ranks[1] = [1, 0, 0, 1]
    plan = Placement.from_rank_of(ranks, layer_ids=layer_ids, topology=topology)
    with pytest.raises(InvalidPlacementError, match="layer 1 differs"):
        export_placement(plan, path, Engine.VLLM, options=options)
    with pytest.raises(InvalidPlacementError, match="must be one of"):
        options = ExportOptions(pull_request=1)
        export_placement(plan, path, Engine.VLLM, options=options)


def test_memory_of_spare_slots_is_told(placement, tmp_path):
    options = dataclasses.replace(LAYERS, expert_bytes=100.0)
    exported = export_placement(placement, tmp_path / "e", Engine.EPLB, options=options)
    assert exported.num_replicas == 2
    assert exported.extra_bytes == 200.0
    exported = export_placement(placement, tmp_path / "e", Engine.EPLB, options=LAYERS)
    assert exported.extra_bytes is None


@pytest.mark.parametrize("engine", Engine)
def test_commands_name_the_file(placement, tmp_path, engine):
    out = tmp_path / "out"
    options = ExportOptions(num_layers=4)
    exported = export_placement(placement, out, engine, options=options)
    assert str(out) in exported.command
    assert "{path}" not in exported.command
    assert exported.notes


def test_what_eplb_and_vllm_planned_is_read(tmp_path):
    """Their plans may put an expert on a rank twice: one of the slots is empty then."""
    options = ReadOptions(num_ranks=4, ranks_per_node=2, layers=(1, 2, 3), model="m")
    for name in ("eplb/rebalanced.safetensors", "vllm/rebalanced.json"):
        read = read_engine_placement(FOLDER / name, options=options)
        assert read.layer_ids.tolist() == [1, 2, 3]
        assert (read.num_experts, read.num_slots) == (64, 72)
        assert read.provenance.model == "m"
    tensors = load_file(FOLDER / "eplb/rebalanced.safetensors")
    theirs = tensors["phy2log"]
    filled = np.where(read.slot_experts == EMPTY, theirs, read.slot_experts)
    eplb = read_engine_placement(
        FOLDER / "eplb/rebalanced.safetensors", options=options
    )
    empty = eplb.slot_experts == EMPTY
    assert np.array_equal(eplb.slot_experts[~empty], theirs[~empty])
    assert filled.shape == theirs.shape


def test_vllm_ascends_own_record_is_our_placement():
    read = read_engine_placement(
        FOLDER / "vllm_ascend/recorded.json", options=ReadOptions(layers=(1, 2, 3))
    )
    ours = read_placement(FOLDER / "placement.json")
    assert np.array_equal(read.slot_experts, ours.slot_experts)
    assert read.layer_ids.tolist() == ours.layer_ids.tolist()
    assert read.topology.num_ranks == 4


SLOTS = {"physical_to_logical_map": [[0, 1], [1, 0]]}
ASCEND = {
    "moe_layer_count": 1,
    "layer_list": [
        {
            "layer_id": 0,
            "device_count": 2,
            "device_list": [
                {"device_id": 0, "device_expert": [0]},
                {"device_id": 1, "device_expert": [1]},
            ],
        }
    ],
}


def changed(content, *path, value):
    content = json.loads(json.dumps(content))
    inner = content
    for key in path[:-1]:
        inner = inner[key]
    inner[path[-1]] = value
    return content


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({**SLOTS, "extra": 1}, "wanted the one key"),
        ({"physical_to_logical_map": [[0, 1], [1]]}, "all of one length"),
        ({"physical_to_logical_map": [[0, 1], [1, 2**40]]}, "lists of expert ids"),
        ({"physical_to_logical_map": [[0, -1]]}, "expert ids must be 0"),
        ({"physical_to_logical_map": [[0, 32767]]}, "expert ids must be 0"),
        ({"physical_to_logical_map": [[0, 0.5]]}, "lists of expert ids"),
        ({"physical_to_logical_map": [[0, True]]}, "lists of expert ids"),
        ({"physical_to_logical_map": [[0, float("nan")]]}, "lists of expert ids"),
        ({"physical_to_logical_map": []}, "lists of expert ids"),
        ({"physical_to_logical_map": [[]]}, "wanted .layers, slots."),
        ({"physical_to_logical_map": [[0, 2]]}, "no slot for experts"),
        ({"physical_to_logical_map": [[0, 1, 2]]}, "cannot be shared equally"),
        (changed(ASCEND, "moe_layer_count", value=2), "moe_layer_count is 2"),
        (changed(ASCEND, "layer_list", value=[]), "wanted a list"),
        (changed(ASCEND, "layer_list", 0, "layer_id", value=5), "in order"),
        (changed(ASCEND, "layer_list", 0, "device_count", value=5), "in order"),
        (changed(ASCEND, "layer_list", 0, "device_list", value=5), "in order"),
        (changed(ASCEND, "layer_list", 0, "device_list", 1, value=5), "in order"),
        (
            changed(
                ASCEND, "layer_list", 0, "device_list", 1, "device_expert", value=7
            ),
            "lists of expert ids",
        ),
        ([[0, 1], [0]], "all of one length"),
        ([0, "1"], "lists of expert ids"),
        ({"expert_to_ep_rank": [0, 0, 1]}, "wanted as many each"),
        ({"expert_to_ep_rank": [0, 7]}, "ranks must be"),
        ({"other": 1}, "no placement file of"),
    ],
)
def test_hostile_json(tmp_path, content, message):
    path = tmp_path / "p.json"
    path.write_text(json.dumps(content))
    with pytest.raises(InvalidPlacementError, match=message):
        read_engine_placement(path, options=ReadOptions(num_ranks=2))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"physical_to_logical_map": [[0, 1]', "not JSON"),
        ('{"physical_to_logical_map": ' + "[" * 100_000, "not JSON"),
        ('{"layer_list": 1, "layer_list": 2}', "there twice"),
        ("", "no placement file of"),
        ("hello", "no placement file of"),
    ],
)
def test_hostile_text(tmp_path, text, message):
    path = tmp_path / "p.json"
    path.write_text(text)
    with pytest.raises(InvalidPlacementError, match=message):
        read_engine_placement(path, options=ReadOptions(num_ranks=2))


GOOD = "num_slots: 2\ninitial_global_assignments:\n  3: [0, 1]\n"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (GOOD + "ep_size: 2\n", "wanted the keys"),
        (GOOD.replace("2", "3", 1), "num_slots is 3, layers list 2"),
        (GOOD.replace("3:", "x:"), "must map layer numbers"),
        (GOOD.replace("3:", "-3:"), "must map layer numbers"),
        (GOOD.replace("[0, 1]", "5"), "lists of expert ids"),
        (GOOD.replace("0, 1", "0, .nan"), "lists of expert ids"),
        ("num_slots: 2\n", "must map layer numbers"),
        ("num_slots: [" + "[" * 5000, "not YAML"),
        ("num_slots: &a [1]\nb: *a\n", "aliases are refused"),
        ("num_slots: !!python/object/apply:os.mkdir [harm-done]\n", "not YAML"),
        ("num_slots: {[1]: 2}\n", "not YAML"),
    ],
)
def test_hostile_yaml(tmp_path, monkeypatch, text, message):
    pytest.importorskip("yaml")
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "p.yaml"
    path.write_text(text)
    with pytest.raises(InvalidPlacementError, match=message):
        read_engine_placement(path, options=ReadOptions(num_ranks=2))
    assert not (tmp_path / "harm-done").exists()


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        ({"phy2log": np.array([[0, 1]]), "x": np.zeros(1)}, "wanted the tensors"),
        ({"logcnt": np.array([[1, 1]])}, "wanted the tensors"),
        ({"phy2log": np.array([[0.0, 1.0]])}, "must be integers"),
        ({"phy2log": np.array([0, 1])}, "must be integers"),
        ({"phy2log": np.array([[0, 2**40]])}, "expert ids must be"),
        (
            {"phy2log": np.array([[0, 1]]), "logcnt": np.array([[2, 1]])},
            "does not count phy2log",
        ),
    ],
)
def test_hostile_tensors(tmp_path, tensors, message):
    save_file(tensors, tmp_path / "p.safetensors")
    with pytest.raises(InvalidPlacementError, match=message):
        read_engine_placement(
            tmp_path / "p.safetensors", options=ReadOptions(num_ranks=2)
        )


def test_large_files_are_refused_before_they_are_parsed(tmp_path, monkeypatch):
    from moetuner.export import base

    path = tmp_path / "p.json"
    path.write_text(json.dumps({"physical_to_logical_map": [[0, 1, 2, 3]]}))
    monkeypatch.setattr(base, "MAX_VALUES", 3)
    with pytest.raises(InvalidPlacementError, match="more than 3 values"):
        read_engine_placement(path)
    monkeypatch.setattr(base, "MAX_FILE_BYTES", 3)
    with pytest.raises(InvalidPlacementError, match="larger than 3 bytes"):
        read_engine_placement(path)


def test_what_a_file_does_not_say_must_be_told(tmp_path):
    path = tmp_path / "p.json"
    path.write_text(json.dumps(SLOTS))
    with pytest.raises(InvalidPlacementError, match="say `num_ranks`"):
        read_engine_placement(path)
    with pytest.raises(InvalidPlacementError, match="no row for layers"):
        options = ReadOptions(num_ranks=2, layers=(5,))
        read_engine_placement(path, options=options)
    read = read_engine_placement(path, options=ReadOptions(num_ranks=2, layers=(1,)))
    assert read.slot_experts.tolist() == [[1, 0]]
    path.write_text(json.dumps(ASCEND))
    with pytest.raises(InvalidPlacementError, match="for 2 ranks, got 4"):
        read_engine_placement(path, options=ReadOptions(num_ranks=4))


def test_yaml_without_its_library_says_how_to_get_it(tmp_path, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "yaml", None)
    (tmp_path / "p.yaml").write_text(GOOD)
    with pytest.raises(MissingDependencyError, match=r"moetuner\[yaml\]"):
        read_engine_placement(tmp_path / "p.yaml")


def test_repeats_become_empty_slots():
    from moetuner.export.base import SlotMap

    slots = np.array([[0, 0, 1, 1, 2, 1]])
    read = to_placement(SlotMap(slots=slots), ReadOptions(num_ranks=2), "test")
    assert read.slot_experts.tolist() == [[0, -1, 1, 1, 2, -1]]


@pytest.mark.parametrize("engine", [Engine.SGLANG, Engine.VLLM, Engine.VLLM_ASCEND])
def test_the_command_holds_any_file_name(placement, tmp_path, engine):
    out = tmp_path / 'it\'s my "file".json'
    exported = export_placement(
        placement, out, engine, options=ExportOptions(num_layers=4)
    )
    (word,) = (word for word in shlex.split(exported.command) if "my" in word)
    if word.startswith("{"):
        content = json.loads(word)
        content = content.get("eplb_config", content)
        (word,) = (text for text in content.values() if isinstance(text, str))
    assert word == str(out)


def test_no_layer_asked_for_is_refused(placement, tmp_path):
    export_placement(placement, tmp_path / "x.yaml", Engine.TRTLLM, options=LAYERS)
    with pytest.raises(InvalidPlacementError, match="no layer is asked for"):
        read_engine_placement(
            tmp_path / "x.yaml", options=ReadOptions(num_ranks=2, layers=())
        )
