"""Damaged recordings are refused by one error, or hold a legal trace; nothing else.

`MOETUNER_FUZZ` multiplies the number of inputs.
"""

import base64
import io
import json
import shutil
import struct
import zipfile
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest
from damage import DAMAGE, LONG, damaged
from engine_files import FOLDER
from hypothesis import given
from hypothesis import strategies as st
from moetuner.errors import InvalidTraceError, MissingDependencyError
from moetuner.trace import read_trace
from moetuner.trace.importers import (
    ImportOptions,
    RecordingFormat,
    detect_format,
    import_recording,
)
from safetensors.numpy import save

OPTIONS = {
    "routed-responses": ImportOptions(num_layers=4, top_k=4),
    "sglang-recorder": ImportOptions(top_k=4),
}


def archive(**arrays):
    stream = io.BytesIO()
    np.savez(stream, **arrays)
    return stream.getvalue()


def npy_of(array):
    stream = io.BytesIO()
    np.save(stream, array)
    return stream.getvalue()


def ids_archive():
    ids = np.argsort(np.random.default_rng(0).random((9, 2, 8)))[..., :2]
    return archive(experts=ids.astype(np.int16), seq=np.arange(9), meta="{}")


def table_of_routes(kind):
    ids = np.argsort(np.random.default_rng(0).random((9, 2, 8)))[..., :2]
    rows = [
        {"request_id": t // 5, "pos": t % 5, "layer": 3 + n, "expert_ids": row.tolist()}
        for t, token in enumerate(ids)
        for n, row in enumerate(token)
    ]
    if kind == "parquet":
        arrow = pytest.importorskip("pyarrow")
        from pyarrow import parquet

        stream = io.BytesIO()
        parquet.write_table(arrow.Table.from_pylist(rows), stream)
        return stream.getvalue()
    if kind == "csv":
        lines = [",".join(rows[0])]
        lines += [",".join(f'"{value}"' for value in row.values()) for row in rows]
        return "\n".join(lines).encode()
    return "\n".join(map(json.dumps, rows)).encode()


def counts_in_csv():
    rows = [f"{layer},{e},{layer * e}" for layer in (1, 2) for e in range(1, 5)]
    return "\n".join(["layer_id,expert_id,count", *rows]).encode()


def responses_of_lists():
    ids = np.argsort(np.random.default_rng(0).random((9, 3, 8)))[..., :4]
    packed = {"data": "", "shape": [4, 3, 4], "dtype": "uint8", "start": 5}
    packed["data"] = base64.b64encode(ids[5:].astype(np.uint8).tobytes()).decode()
    answer = {"routed_experts": ids[5:].tolist()}
    response = {
        "prompt_routed_experts": ids[:5].tolist(),
        "choices": [answer, {"routed_experts": packed}],
        "usage": {"prompt_tokens": 5, "completion_tokens": 10},
    }
    return (json.dumps(response) + "\n").encode() * 2


def json_counts():
    return json.dumps({"logical_count": [[4, 0, 3], [2, 2, 3]], "top_k": 2}).encode()


def loads_by_rank():
    return npy_of(np.arange(24).reshape(3, 2, 4))


def weights():
    return save({"weight": np.load(FOLDER / "load.npy")})


SGLANG = FOLDER / "sglang"
SOURCES = {
    "sglang-recorder": (SGLANG / "per_token/expert_distribution_recorder_0_0.pt"),
    "sglang-recorder per_pass": SGLANG / "per_pass/expert_distribution_recorder_0_0.pt",
    "sglang-recorder stat": SGLANG / "stat/expert_distribution_recorder_0.pt",
    "routed-responses": SGLANG / "responses.jsonl",
    "routed-responses vllm": FOLDER / "vllm/responses.jsonl",
    "routed-arrays": FOLDER / "vllm/request0.npy",
    "trtllm counts": FOLDER / "trtllm_counts/rank0.safetensors",
    "trtllm raw": FOLDER / "trtllm/token_selected_experts_rank0.safetensors",
    "trtllm meta": FOLDER / "trtllm/meta_info.json",
    "megatron": FOLDER / "megatron/router_trace_rank0.jsonl",
    "eplb": FOLDER / "load.npy",
    "eplb safetensors": weights,
    "eplb pt": FOLDER / "eplb/weight.pt",
    "eplb json": json_counts,
    "eplb averages": lambda: npy_of(np.arange(1, 25).reshape(2, 3, 4) / 7),
    "rank-loads": loads_by_rank,
    "routed-responses lists": responses_of_lists,
    "table jsonl": lambda: table_of_routes("jsonl"),
    "table csv": lambda: table_of_routes("csv"),
    "table parquet": lambda: table_of_routes("parquet"),
    "table counts": counts_in_csv,
    "npz": ids_archive,
    "npz counts": lambda: archive(counts=np.ones((2, 3, 4), np.int64)),
}


def content_of(source):
    return source() if callable(source) else source.read_bytes()


def try_import(path, kind):
    out = path.parent / "out.safetensors"
    out.unlink(missing_ok=True)
    try:
        import_recording(
            [path], out, format=RecordingFormat(kind), options=OPTIONS.get(kind)
        )
    except InvalidTraceError:
        assert not out.exists()
        return
    read_trace(out)


def check(name, data, folder):
    kind = name.partition(" ")[0]
    if kind == "trtllm":
        whole = shutil.copytree(SOURCES[name].parent, folder / "s", dirs_exist_ok=True)
        (Path(whole) / SOURCES[name].name).write_bytes(data)
        try_import(Path(whole), kind)
        return
    path = folder / "damaged"
    path.write_bytes(data)
    try_import(path, kind)
    with suppress(InvalidTraceError):
        detect_format(path)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("fuzz")


@pytest.mark.parametrize("name", SOURCES)
def test_undamaged_recordings_are_read(name, folder):
    """Else the damage below would be refused unread."""
    if "recorder" in name or name.endswith(" pt"):
        pytest.importorskip("torch")
    check(name, content_of(SOURCES[name]), folder)
    assert (folder / "out.safetensors").exists()


@pytest.mark.parametrize("name", SOURCES)
def test_damaged_recordings(name, folder):
    if "recorder" in name or name.endswith(" pt"):
        pytest.importorskip("torch")
    content = content_of(SOURCES[name])

    @LONG
    @given(DAMAGE)
    def run(damage):
        check(name, damaged(content, damage), folder)

    run()


@pytest.mark.parametrize("name", ["sglang-recorder", "eplb pt", "npz"])
def test_damaged_members_of_archives(name, folder):
    """Checksums that fit, so that the damage gets past the archive's own check."""
    if name != "npz":
        pytest.importorskip("torch")
    with zipfile.ZipFile(io.BytesIO(content_of(SOURCES[name]))) as source:
        members = {member: source.read(member) for member in source.namelist()}

    @LONG
    @given(st.sampled_from(sorted(members)), DAMAGE)
    def run(victim, damage):
        changed = members | {victim: damaged(members[victim], damage)}
        stream = io.BytesIO()
        with zipfile.ZipFile(stream, "w") as target:
            for member, content in changed.items():
                target.writestr(_aligned(target, member), content)
        check(name, stream.getvalue(), folder)

    run()


def _aligned(target, name):
    """A member that begins where torch.save puts it, at a multiple of 64."""
    member = zipfile.ZipInfo(name)
    start = target.fp.tell() + 30 + len(name) + 4
    member.extra = b"FB" + struct.pack("<H", -start % 64) + b"Z" * (-start % 64)
    return member


KEYS = [
    "routed_experts",
    "meta_info",
    "choices",
    "usage",
    "prompt_tokens",
    "step",
    "layer",
    "layers",
    "model.layers.3.mlp",
    "rank",
    "top_indices",
    "num_tokens",
    "topk",
    "block",
    "prompt_routed_experts",
    "sgl_ext",
    "completion_tokens",
    "data",
    "shape",
    "dtype",
    "start",
    "logical_count",
    "expert_ids",
    "expert",
    "count",
    "token",
    "request",
    "0",
    "3",
]
JSON_KINDS = ["routed-responses", "megatron", "eplb", "rank-loads", "table"]
JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(max_size=4)
    | st.sampled_from(["model.layers.3.mlp", "layer_4", "layers.1.layers.2"]),
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.dictionaries(st.sampled_from(KEYS), inner, max_size=5)
    ),
    max_leaves=12,
)


@LONG
@given(st.lists(JSON, max_size=4), st.sampled_from(JSON_KINDS))
def test_any_json(tmp_path_factory, values, kind):
    folder = tmp_path_factory.getbasetemp() / "json"
    folder.mkdir(exist_ok=True)
    path = folder / "lines"
    path.write_text("".join(json.dumps(value) + "\n" for value in values))
    try_import(path, kind)


@LONG
@given(st.binary(max_size=200), st.sampled_from(list(RecordingFormat)))
def test_any_bytes(tmp_path_factory, data, kind):
    folder = tmp_path_factory.getbasetemp() / "bytes"
    folder.mkdir(exist_ok=True)
    path = folder / "bytes"
    path.write_bytes(data)
    # Parquet may need what is not installed: that is said by an error of its own.
    parquet = data.startswith(b"PAR1")
    with suppress(*([MissingDependencyError] if parquet else [])):
        if kind is not RecordingFormat.TRTLLM:
            try_import(path, kind.value)
        with suppress(InvalidTraceError):
            detect_format(path)
