"""Loads in the files that people keep them in."""

import json

import numpy as np
import pytest
from moetuner.errors import InvalidTraceError
from moetuner.trace import CountTrace
from moetuner.trace.importers import detect_format
from safetensors.numpy import save_file

LOAD = np.array([[4, 0, 3, 1], [2, 2, 3, 1], [0, 8, 0, 0]])


def text(path, value, indent=None):
    path.write_text(json.dumps(value, indent=indent))
    return path


JSON = {
    "logical_count": {"logical_count": LOAD.tolist()},
    "with a rank": {"rank": 0, "logical_count": LOAD.tolist(), "time": 1.5},
    "steps": {"logical_count": [LOAD.tolist()]},
    "bare": LOAD.tolist(),
    "by layer": {str(n): row for n, row in enumerate(LOAD.tolist())},
    "by name": {f"layer_{n}": row for n, row in enumerate(LOAD.tolist())},
    "nested": {"layers": {str(n): row for n, row in enumerate(LOAD.tolist())}},
    "sparse": {
        str(n): {str(e): int(c) for e, c in enumerate(row) if c}
        for n, row in enumerate(LOAD)
    },
}


NAMES = [f"model.layers.{n}.mlp.experts" for n in (3, 4, 6)]
BY_MODULE = {
    "keys": dict(zip(NAMES, LOAD.tolist(), strict=True)),
    "a list": {"layers": NAMES, "expert_count": LOAD.tolist()},
    "a line each": [
        {"layer": name, "expert_count": row}
        for name, row in zip(NAMES, LOAD.tolist(), strict=True)
    ],
}


@pytest.mark.parametrize("name", BY_MODULE)
def test_layers_by_the_names_of_modules(importing, tmp_path, name):
    trace = importing(text(tmp_path / "a.json", BY_MODULE[name]))
    assert trace.counts.tolist() == [LOAD.tolist()]
    assert trace.layer_ids.tolist() == [3, 4, 6]


def test_names_that_say_no_layer_are_refused(importing, tmp_path):
    value = {"layers": ["a", "b", "c"], "expert_count": LOAD.tolist()}
    with pytest.raises(InvalidTraceError, match="'a' says no number of a layer"):
        importing(text(tmp_path / "a.json", value))


@pytest.mark.parametrize("indent", [None, 2])
@pytest.mark.parametrize("name", JSON)
def test_counts_in_json(importing, tmp_path, name, indent):
    trace = importing(text(tmp_path / "a.json", JSON[name], indent))
    assert isinstance(trace, CountTrace)
    assert trace.counts.tolist() == [LOAD.tolist()]
    assert trace.layer_ids.tolist() == [0, 1, 2]
    assert trace.top_k is None
    assert importing(tmp_path / "a.json", top_k=2).num_tokens.tolist() == [4]
    assert importing.result.format.value == "eplb"


def test_layers_and_top_k_that_json_says(importing, tmp_path):
    value = {"load": LOAD.tolist(), "layer_ids": [3, 5, 9], "top_k": 4}
    trace = importing(text(tmp_path / "a.json", value))
    assert trace.layer_ids.tolist() == [3, 5, 9]
    assert trace.top_k == 4
    with pytest.raises(InvalidTraceError, match="the recording says 4"):
        importing(tmp_path / "a.json", top_k=2)
    with pytest.raises(InvalidTraceError, match="leave it out"):
        importing(tmp_path / "a.json", layers=(1, 2, 3))


def test_a_line_for_each_step(importing, tmp_path):
    lines = [json.dumps({"step": n, "logical_count": LOAD.tolist()}) for n in range(3)]
    (tmp_path / "a.jsonl").write_text("\n".join(lines))
    assert importing(tmp_path / "a.jsonl").num_groups == 3
    lines = [
        json.dumps({"step": step, "layer": 3 + n, "expert_load": row})
        for step in range(2)
        for n, row in enumerate(LOAD.tolist())
    ]
    (tmp_path / "a.jsonl").write_text("\n".join(lines))
    trace = importing(tmp_path / "a.jsonl", format="eplb")
    assert trace.counts.tolist() == [LOAD.tolist()] * 2
    assert trace.layer_ids.tolist() == [3, 4, 5]


@pytest.mark.parametrize("kind", ["pt", "npz", "safetensors"])
def test_a_table_among_other_things(importing, tmp_path, kind):
    path = tmp_path / f"a.{kind}"
    if kind == "pt":
        torch = pytest.importorskip("torch")
        content = {"expert_load": torch.tensor(LOAD), "step": torch.tensor(3), "x": "y"}
        torch.save(content, path)
    elif kind == "npz":
        np.savez(path, expert_load=LOAD, step=np.array(3))
    else:
        save_file({"expert_load": LOAD, "step": np.array([3])}, path)
    trace = importing(path, format="eplb")
    assert trace.counts.tolist() == [LOAD.tolist()]
    if kind != "npz":
        assert detect_format(path).value == "eplb"


def test_sglang_counts_of_one_step(importing, tmp_path):
    torch = pytest.importorskip("torch")
    torch.save({"rank": 0, "logical_count": torch.tensor(LOAD)}, tmp_path / "a.pt")
    assert importing(tmp_path / "a.pt").counts.tolist() == [LOAD.tolist()]
    torch.save(
        {"logical_count": torch.tensor(LOAD).T.contiguous().T}, tmp_path / "a.pt"
    )
    assert importing(tmp_path / "a.pt").counts.tolist() == [LOAD.tolist()]


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("steps", [3, 7, 1000])
def test_moving_averages_are_the_counts_they_were_made_from(
    importing, tmp_path, rng, dtype, steps
):
    counts = rng.integers(0, 900, (20, 4, 32))
    counts[0, 0, 0] = 1
    np.save(tmp_path / "a.npy", (counts / steps).astype(dtype))
    trace = importing(tmp_path / "a.npy", format="eplb")
    assert np.array_equal(trace.counts, counts)
    assert any(f"over {steps:,} steps" in note for note in importing.notes)


def test_other_averages_keep_their_size(importing, tmp_path, rng):
    """Whole numbers of a million choices a layer, not of 2**40."""
    loads = rng.random((4, 32)) * 50
    np.save(tmp_path / "a.npy", loads)
    counts = importing(tmp_path / "a.npy").counts[0]
    assert counts.sum(axis=1).max() == pytest.approx(10**6, rel=1e-4)
    np.testing.assert_allclose(counts / counts.sum(), loads / loads.sum(), atol=1e-6)
    np.save(tmp_path / "a.npy", loads * 1e6)
    np.testing.assert_array_equal(
        importing(tmp_path / "a.npy").counts[0], np.rint(loads * 1e6)
    )


def test_loads_by_rank_need_their_format(importing, tmp_path, rng):
    table = rng.integers(0, 99, (6, 8, 4))
    np.save(tmp_path / "a.npy", table)
    with pytest.raises(InvalidTraceError, match="`format` rank-loads"):
        importing(tmp_path / "a.npy")
    trace = importing(tmp_path / "a.npy", format="rank-loads", top_k=2)
    assert trace.counts[0].tolist() == table.reshape(6, 32).tolist()
    assert any("slots are taken as experts" in note for note in importing.notes)
    slots = {n: rng.permutation(32) for n in range(3, 9)}
    trace = importing(
        tmp_path / "a.npy",
        format="rank-loads",
        slot_experts=slots,
        layers=tuple(range(3, 9)),
    )
    for row, layer in enumerate(range(3, 9)):
        assert (
            trace.counts[0, row, slots[layer]].tolist() == table[row].ravel().tolist()
        )
    for wrong in ({3: slots[3]}, dict.fromkeys(range(6), slots[3][:4])):
        with pytest.raises(InvalidTraceError, match="no 32 filled slots"):
            importing(tmp_path / "a.npy", format="rank-loads", slot_experts=wrong)


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ({"logical_count": [[1, 2], [3]]}, "differ in length"),
        ({"logical_count": [["a"]]}, "must be numbers"),
        ({"logical_count": [[-1, 2]]}, "must be 0"),
        ({"logical_count": [[[[1]]]]}, "wanted .layers, experts."),
        ({"logical_count": [1, 2]}, "no table of loads"),
        ({"0": [1, 2], "1": [1]}, "layers differ in experts"),
        ([[[1, 2], [1, 2]]] * 3, "`format`|counts"),
    ],
)
def test_hostile_json(importing, tmp_path, value, message):
    if message == "`format`|counts":
        value = np.arange(48).reshape(4, 3, 4).tolist()
    with pytest.raises(InvalidTraceError, match=message):
        importing(text(tmp_path / "a.json", value))


def test_a_placement_is_no_recording(tmp_path):
    text(tmp_path / "a.json", {"physical_to_logical_map": [[0, 1]]})
    with pytest.raises(InvalidTraceError, match="import-placement"):
        detect_format(tmp_path / "a.json")
    torch = pytest.importorskip("torch")
    torch.save({"physical_to_logical_map": torch.zeros(2, 2)}, tmp_path / "a.pt")
    with pytest.raises(InvalidTraceError, match="import-placement"):
        detect_format(tmp_path / "a.pt")


@pytest.mark.parametrize("wrong", [-5, np.nan])
def test_numbers_that_are_no_loads_name_their_file(importing, tmp_path, wrong):
    table = np.arange(32.0).reshape(2, 16)
    table[1, 3] = wrong
    np.save(tmp_path / "a.npy", table)
    with pytest.raises(InvalidTraceError, match=r"a\.npy: "):
        importing(tmp_path / "a.npy", format="eplb")
