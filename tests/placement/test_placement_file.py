import json
import re

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from moetuner.errors import InvalidPlacementError
from moetuner.placement import file as placement_file
from moetuner.placement.file import read_placement, write_placement
from moetuner.placement.model import EMPTY, Placement, ProgressPoint, Provenance
from moetuner.placement.topology import Topology
from strategies import random_placement, topologies, traces

PROVENANCE = Provenance(
    model="Mixtral-8x7B",
    solver="ilp1",
    objective="max_load",
    value=1.25,
    lower_bound=1.0,
    status="feasible",
    seconds=3.5,
    trace_sha256="ab" * 32,
    options={"seed": 0, "time_limit": 60.0, "memory_slack": None},
    progress=(
        ProgressPoint(stage="ilp1", seconds=0.5, incumbent=2.0),
        ProgressPoint(stage="ilp1", seconds=1.5, incumbent=1.25, bound=1.0),
    ),
)


def example(**fields):
    """Layers 3 and 7; expert 0 is replicated at layer 3, one slot is empty."""
    return Placement(
        slot_experts=np.array([[0, 1, 2, 0, 3, -1], [3, 2, -1, 1, 0, -1]], np.int32),
        layer_ids=np.array([3, 7], np.int32),
        num_experts=4,
        topology=Topology(num_ranks=2, ranks_per_node=1),
        **fields,
    )


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "placement.json"
    write_placement(example(provenance=PROVENANCE), path)
    return path


def assert_same(one, two):
    np.testing.assert_array_equal(one.slot_experts, two.slot_experts)
    np.testing.assert_array_equal(one.layer_ids, two.layer_ids)
    assert one.num_experts == two.num_experts
    assert one.topology == two.topology
    assert one.provenance == two.provenance


def test_replicas_empty_slots_and_provenance_come_back(file):
    assert_same(read_placement(file), example(provenance=PROVENANCE))


@given(
    trace=traces(),
    topology=topologies,
    extra_slots=st.integers(0, 2),
    value=st.none() | st.floats(allow_nan=False, allow_infinity=False),
    model=st.text(max_size=20),
)
def test_any_placement_comes_back(
    tmp_path_factory, trace, topology, extra_slots, value, model
):
    rng = np.random.default_rng(0)
    made = random_placement(rng, trace, topology, extra_slots)
    made = Placement(
        slot_experts=made.slot_experts,
        layer_ids=made.layer_ids + np.int32(2**31 - 10),
        num_experts=made.num_experts,
        topology=made.topology,
        provenance=Provenance(model=model, value=value),
    )
    path = tmp_path_factory.mktemp("round") / "p.json"
    write_placement(made, path)
    assert_same(read_placement(path), made)


def test_the_file_holds_what_it_promises(file):
    content = json.loads(file.read_text())
    assert content["format"] == "moetuner.placement"
    assert content["version"] == 1
    assert content["model"] == "Mixtral-8x7B"
    assert (content["num_ranks"], content["ranks_per_node"]) == (2, 1)
    assert (content["num_experts"], content["slots_per_rank"]) == (4, 3)
    assert content["layers"] == {
        "3": [0, 1, 2, 0, 3, EMPTY],
        "7": [3, 2, EMPTY, 1, 0, EMPTY],
    }
    assert content["provenance"]["solver"] == "ilp1"
    assert content["provenance"]["lower_bound"] == 1.0
    assert content["provenance"]["options"]["seed"] == 0


def test_a_layer_is_one_line(file):
    """So that people can read it, and compare two files line by line."""
    assert '    "7": [3, 2, -1, 1, 0, -1]\n' in file.read_text()


def test_layers_may_stand_in_any_order(file):
    content = json.loads(file.read_text())
    content["layers"] = dict(reversed(content["layers"].items()))
    file.write_text(json.dumps(content))
    assert read_placement(file).layer_ids.tolist() == [3, 7]


def test_a_bare_file_of_another_tool_is_enough(file):
    """Origin and slots per rank may be absent; unknown keys are for later versions."""
    content = json.loads(file.read_text())
    for key in ("model", "provenance", "progress", "slots_per_rank"):
        del content[key]
    file.write_text(json.dumps(content | {"comment": "by hand"}))
    assert_same(read_placement(file), example())


@pytest.mark.parametrize(
    "provenance",
    [
        Provenance(value=float("nan")),
        Provenance(lower_bound=float("inf")),
        Provenance(options={"seed": np.int64(3)}),
    ],
)
def test_when_writing_fails_the_old_file_remains(file, provenance):
    old = file.read_bytes()
    with pytest.raises(InvalidPlacementError, match="provenance cannot be written"):
        write_placement(example(provenance=provenance), file)
    assert file.read_bytes() == old
    assert list(file.parent.iterdir()) == [file]


def test_a_missing_file_is_file_not_found(tmp_path):
    with pytest.raises(FileNotFoundError):
        read_placement(tmp_path / "none.json")


def test_a_folder_is_refused(tmp_path):
    with pytest.raises(InvalidPlacementError, match="a folder, wanted a placement"):
        read_placement(tmp_path)


def test_a_huge_file_is_not_read(file, monkeypatch):
    monkeypatch.setattr(placement_file, "_MAX_BYTES", 100)
    with pytest.raises(InvalidPlacementError, match="larger than 100 bytes"):
        read_placement(file)


def refusal(file):
    with pytest.raises(InvalidPlacementError) as caught:
        read_placement(file)
    message = str(caught.value)
    assert message.startswith(f"{file}: ")
    return message.removeprefix(f"{file}: ")


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", "not JSON"),
        (b"slots: 3", "not JSON"),
        (b'{"format": "moetuner.placement"', "not JSON"),
        (b"\xff\xfe\x00", "not JSON"),
        (b"PK\x03\x04", "not JSON"),
        (b"[" * 100_000, "not JSON"),
        (b"[]", "format is None, wanted 'moetuner.placement'"),
        (b"3", "not a placement file"),
        (b'{"format": "other"}', "format is 'other'"),
        (b'{"format": ["moetuner.placement"]}', "not a placement file"),
    ],
)
def test_what_is_no_placement_file_is_refused(file, content, reason):
    file.write_bytes(content)
    assert reason in refusal(file)


@pytest.mark.parametrize(
    "key",
    ["version", "num_experts", "num_ranks", "ranks_per_node", "layers"],
)
def test_a_missing_key_is_named(file, key):
    content = json.loads(file.read_text())
    del content[key]
    file.write_text(json.dumps(content))
    assert refusal(file) == f"key {key!r} is missing"


@pytest.mark.parametrize(
    ("key", "value", "reason"),
    [
        ("version", 2, "version 2; this moetuner reads version 1"),
        ("version", True, "key 'version' must be int, got True"),
        ("version", "1", "key 'version' must be int, got '1'"),
        ("num_experts", 4.0, "key 'num_experts' must be int, got 4.0"),
        ("num_experts", 0, "num_experts must be 1..32767, got 0"),
        ("num_experts", 40000, "num_experts must be 1..32767"),
        ("num_experts", 5, r"layer 3 has no slot for experts [4]"),
        ("num_experts", 3, "layer 3 holds expert 3"),
        ("num_ranks", None, "key 'num_ranks' must be int, got None"),
        ("num_ranks", 0, "num_ranks must be 1..4096, got 0"),
        ("num_ranks", 4, "6 slots cannot be shared equally by 4 ranks"),
        ("num_ranks", 10**400, "key 'num_ranks' is too large: 1000"),
        ("num_ranks", -(10**400), "key 'num_ranks' is too large: -1000"),
        ("ranks_per_node", 3, "ranks_per_node must divide num_ranks=2, got 3"),
        ("ranks_per_node", -1, "ranks_per_node must divide num_ranks=2, got -1"),
        ("slots_per_rank", 2, "slots_per_rank is 2, but layers hold 6 slots"),
        ("slots_per_rank", "3", "key 'slots_per_rank' must be int"),
        ("model", ["x"], "key 'model' must be str, got ['x']"),
        ("provenance", [], "key 'provenance' must be dict, got []"),
        ("provenance", {"seconds": "3"}, "provenance 'seconds' must be int or float"),
        (
            "provenance",
            {"value": True},
            "provenance 'value' must be int or float or nu",
        ),
        ("provenance", {"options": 3}, "provenance 'options' must be dict, got 3"),
        ("layers", [[0, 1, 2, 3]], "key 'layers' must be dict"),
        ("layers", {}, "no layers"),
        ("layers", {"x": [0, 1, 2, 3]}, "layer 'x' is not a layer number"),
        ("layers", {"-1": [0, 1, 2, 3]}, "layer '-1' is not a layer number"),
        ("layers", {"01": [0, 1, 2, 3]}, "layer '01' is not a layer number"),
        ("layers", {"\u0661": [0, 1, 2, 3]}, "is not a layer number"),
        ("layers", {"2147483648": [0, 1, 2, 3]}, "is not a layer number"),
        ("layers", {"9" * 5000: [0, 1, 2, 3]}, "is not a layer number"),
        ("layers", {"0": 3}, "layer 0 must list one expert id per slot"),
        ("layers", {"0": []}, "layer 0 must list one expert id per slot"),
        ("layers", {"0": [0, 1], "1": [0]}, "layer 1 must list one expert id per"),
        ("layers", {"0": [0, 1, 2, True]}, "layer 0 holds True, not an expert id"),
        ("layers", {"0": [0, 1, 2, 3.0]}, "layer 0 holds 3.0, not an expert id"),
        ("layers", {"0": [0, 1, 2, None]}, "layer 0 holds None, not an expert id"),
        ("layers", {"0": [0, 1, 2, [3]]}, "layer 0 holds [3], not an expert id"),
        ("layers", {"0": [0, 1, 2, 10**30]}, "layer 0 holds 1000"),
        ("layers", {"0": [0, 1, 2, -2]}, "layer 0 holds -2, not an expert id"),
        ("layers", {"0": [0, 1, 2, 2]}, "layer 0 has no slot for experts [3]"),
        (
            "layers",
            {"5": [0, 1, 0, 2, 3, -1]},
            "rank 0 holds expert 0 twice at layer 5",
        ),
    ],
)
def test_a_wrong_value_is_refused_by_name(file, key, value, reason):
    content = json.loads(file.read_text())
    content[key] = value
    if key == "layers":
        content.pop("slots_per_rank")
    file.write_text(json.dumps(content))
    message = refusal(file)
    assert reason in message
    assert len(message) < 200


@pytest.mark.parametrize(
    ("old", "new", "reason"),
    [
        ('"7":', '"3":', "key '3' is there twice"),
        ('"num_ranks": 2', '"num_ranks": 2, "num_ranks": 1', "'num_ranks' is there tw"),
        ('"value": 1.25', '"value": NaN', "NaN is not a number that JSON knows"),
        ('"value": 1.25', '"value": -Infinity', "-Infinity is not a number"),
        ('"value": 1.25', '"value": 1e999', "1e999 is too large a number"),
        ('"num_ranks": 2', '"num_ranks": ' + "9" * 5000, "not JSON: Exceeds"),
    ],
)
def test_a_text_that_json_readers_disagree_on_is_refused(file, old, new, reason):
    """Twice the same key, and numbers outside JSON or beyond any computer's."""
    text = file.read_text()
    assert old in text
    file.write_text(text.replace(old, new))
    assert reason in refusal(file)


@pytest.mark.parametrize("depth", range(900, 1000, 5))
def test_no_depth_of_nesting_gets_through(file, depth):
    """Neither the parser nor the message about what it found overflows the stack."""
    deep = "[" * depth + "]" * depth
    text = file.read_text()
    file.write_text(text.replace('"num_ranks": 2', f'"num_ranks": {deep}'))
    assert refusal(file)


@given(content=st.binary(max_size=200))
def test_no_bytes_crash_the_reader(tmp_path_factory, content):
    path = tmp_path_factory.mktemp("bytes") / "p.json"
    path.write_bytes(content)
    assert refusal(path)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: (
        st.lists(inner, max_size=5)
        | st.dictionaries(st.sampled_from("0123x"), inner, max_size=4)
    ),
    max_leaves=10,
)


@given(key=st.sampled_from(sorted(placement_file._REQUIRED)), value=JSON)
def test_no_json_value_crashes_the_reader(tmp_path_factory, key, value):
    """Whatever stands at a key: a legal placement, or the documented error."""
    path = tmp_path_factory.mktemp("json") / "p.json"
    write_placement(example(), path)
    content = json.loads(path.read_text())
    path.write_text(json.dumps(content | {key: value}))
    try:
        found = read_placement(path)
    except InvalidPlacementError:
        assert refusal(path)
    else:
        assert_same(found, example())


@pytest.mark.parametrize(
    ("progress", "message"),
    [
        ({}, "key 'progress' must be list"),
        ([1], "a point of progress must be dict, got 1"),
        ([{"stage": "ilp1"}], "a point of progress lacks 'seconds'"),
        ([{"stage": 1, "seconds": 0}], "progress 'stage' must be str, got 1"),
        ([{"stage": "a", "seconds": None}], "progress 'seconds' must be"),
        ([{"stage": "a", "seconds": 0, "bound": "x"}], "progress 'bound' must be"),
        ([{"stage": "a", "seconds": 0}] * 10_001, "at most 10000 are read"),
    ],
)
def test_a_course_that_no_solver_wrote_is_refused(file, progress, message):
    content = json.loads(file.read_text())
    content["progress"] = progress
    file.write_text(json.dumps(content))
    with pytest.raises(InvalidPlacementError, match=re.escape(message)):
        read_placement(file)
