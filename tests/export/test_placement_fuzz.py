"""Damaged placement files are refused by one error, or hold a legal placement."""

import io
import json

import numpy as np
import pytest
from damage import DAMAGE, LONG, damaged
from engine_files import FOLDER
from hypothesis import given
from hypothesis import strategies as st
from moetuner.errors import InvalidPlacementError
from moetuner.export import Engine, ReadOptions, read_engine_placement
from moetuner.export.torch_map import torch_bytes
from moetuner.placement.model import Placement

FILES = {
    "sglang.json": Engine.SGLANG,
    "trtllm.yaml": Engine.TRTLLM,
    "vllm_ascend.json": Engine.VLLM_ASCEND,
    "vllm.json": Engine.VLLM,
    "eplb.safetensors": Engine.EPLB,
}
ARRAYS = {
    "start map": (Engine.VLLM_START_MAP, lambda: torch_bytes(SLOTS)),
    "npy": (Engine.EPLB, lambda: npy_of(SLOTS)),
}
SLOTS = np.tile(np.arange(8), (3, 1))
KEYS = ["physical_to_logical_map", "layer_list", "moe_layer_count", "layer_id"]
KEYS += ["device_count", "device_list", "device_id", "device_expert"]
KEYS += ["expert_to_ep_rank", "num_slots", "initial_global_assignments"]
JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-3, 9) | st.integers() | st.floats(),
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.dictionaries(st.sampled_from(KEYS), inner, max_size=4)
    ),
    max_leaves=12,
)


def npy_of(array):
    stream = io.BytesIO()
    np.save(stream, array)
    return stream.getvalue()


def try_read(path, engine):
    try:
        read = read_engine_placement(
            path, engine=engine, options=ReadOptions(num_ranks=4)
        )
    except InvalidPlacementError:
        return
    assert isinstance(read, Placement)


@pytest.mark.parametrize("name", FILES)
def test_damaged_files(name, tmp_path_factory):
    if name.endswith("yaml"):
        pytest.importorskip("yaml")
    content = (FOLDER / "exports" / name).read_bytes()
    path = tmp_path_factory.mktemp("fuzz") / "damaged"

    @LONG
    @given(DAMAGE, st.sampled_from([FILES[name], None]))
    def run(damage, engine):
        path.write_bytes(damaged(content, damage))
        try_read(path, engine)

    run()


@pytest.mark.parametrize("name", ARRAYS)
def test_damaged_arrays(name, tmp_path_factory):
    if name == "start map":
        pytest.importorskip("torch")
    engine, make = ARRAYS[name]
    content = make()
    path = tmp_path_factory.mktemp("fuzz") / "damaged"
    path.write_bytes(content)
    assert read_engine_placement(path, options=ReadOptions(num_ranks=4))

    @LONG
    @given(DAMAGE, st.sampled_from([engine, None]))
    def run(damage, engine):
        path.write_bytes(damaged(content, damage))
        try_read(path, engine)

    run()


@LONG
@given(JSON, st.sampled_from([None, *(e for e in Engine if e is not Engine.DEEPEP)]))
def test_any_json(tmp_path_factory, value, engine):
    pytest.importorskip("yaml")
    path = tmp_path_factory.getbasetemp() / "placement.json"
    path.write_text(json.dumps(value))
    try_read(path, engine)
