import dataclasses
import json
import os
import re
import struct

import numpy as np
import pytest
from hypothesis import given
from moetuner.errors import InvalidTraceError
from moetuner.trace import Trace, TraceMetadata, read_trace, write_trace
from safetensors.numpy import load_file, save_file
from strategies import full_traces, make_trace, random_ids

HEADER = {
    "format": "moetuner.trace",
    "version": "1",
    "num_experts": "4",
    "ranked": "false",
}
TENSORS = {
    "topk_ids": np.array([[[0, 1], [2, 3]], [[3, 0], [1, 2]]], np.int16),
    "layer_ids": np.array([1, 2], np.int32),
}


def without(key):
    return {k: v for k, v in HEADER.items() if k != key}


def read(tmp_path, header=HEADER, **tensors):
    """What a file with these tensors, and none that is None, is read as."""
    tensors = {n: t for n, t in (TENSORS | tensors).items() if t is not None}
    save_file(tensors, tmp_path / "some.trace", metadata=header)
    return read_trace(tmp_path / "some.trace")


def assert_same(one, other):
    """Equal in every field, types included."""
    for field in dataclasses.fields(Trace):
        a, b = getattr(one, field.name), getattr(other, field.name)
        if isinstance(a, np.ndarray):
            assert a.dtype == b.dtype, field.name
            np.testing.assert_array_equal(a, b, err_msg=field.name)
        else:
            assert a == b, field.name


@given(full_traces())
def test_a_written_trace_is_read_back_whole(tmp_path_factory, trace):
    path = tmp_path_factory.mktemp("round") / "trip.safetensors"
    write_trace(trace, path)
    again = read_trace(path)
    assert_same(trace, again)
    assert again.sha256() == trace.sha256()


def test_real_traces_survive(tmp_path, traces_dir):
    trace = read_trace(traces_dir / "gpt-oss-20b-fingerprinting" / "other.npz")
    write_trace(trace, tmp_path / "a")
    assert_same(trace, read_trace(tmp_path / "a"))


def test_a_file_that_does_not_say_ranked_is_not(tmp_path):
    assert not read(tmp_path, without("ranked")).ranked
    assert read(tmp_path, HEADER | {"ranked": "true"}).ranked


def test_strided_arrays_survive(tmp_path):
    every_second = np.arange(8, dtype=np.int32)[::2]
    ids = random_ids(np.random.default_rng(0), 4, 2, 5, 2)
    write_trace(make_trace(ids, 5, sequence=every_second), tmp_path / "a")
    assert read_trace(tmp_path / "a").sequence.tolist() == [0, 2, 4, 6]


@pytest.mark.parametrize(
    ("num_experts", "padded", "stored"),
    [(256, False, np.uint8), (256, True, np.int16), (257, False, np.int16)],
)
def test_small_ids_take_one_byte(tmp_path, num_experts, padded, stored):
    ids = np.array([[[0, -1 if padded else num_experts - 1]]], np.int16)
    write_trace(make_trace(ids, num_experts), tmp_path / "a")
    assert load_file(tmp_path / "a")["topk_ids"].dtype == stored
    np.testing.assert_array_equal(read_trace(tmp_path / "a").topk_ids, ids)


PICKY = [
    ({"format": "pt"}, "not a routing trace: its metadata says format='pt', wanted"),
    (None, "not a routing trace: its metadata says format=None"),
    (HEADER | {"version": "2"}, "trace version '2'; this moetuner reads version 1"),
    (without("version"), "trace version None; this moetuner reads version 1"),
    (without("num_experts"), "damaged trace file: KeyError: 'num_experts'"),
    (HEADER | {"ranked": "perhaps"}, "damaged trace file: KeyError: 'perhaps'"),
    (HEADER | {"num_experts": "four"}, "damaged trace file: ValueError"),
    (HEADER | {"num_experts": "0"}, "num_experts must be 1..32767, got 0"),
    (HEADER | {"num_experts": "9" * 4000}, "num_experts must be 1..32767"),
    (HEADER | {"num_experts": "3"}, "expert id 3 at token 0"),
    (HEADER | {"extra": "{"}, "damaged trace file: JSONDecodeError"),
    (HEADER | {"extra": "[]"}, "metadata 'extra' must be a JSON object"),
    (HEADER | {"extra": "[" * 100000}, "damaged trace file: RecursionError"),
    (HEADER | {"extra": '{"a": "\\ud800"}'}, "extra 'a' is not Unicode text"),
    (HEADER | {"model": "x" * (1 << 20)}, "truncated, or not a safetensors file"),
]


@pytest.mark.parametrize(("header", "message"), PICKY, ids=range(len(PICKY)))
def test_foreign_newer_and_damaged_headers_are_refused(tmp_path, header, message):
    with pytest.raises(InvalidTraceError, match=re.escape(message)) as caught:
        read(tmp_path, header)
    assert str(tmp_path / "some.trace") in str(caught.value)


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        ({"topk_ids": None}, "unknown tensors [], missing tensors ['topk_ids']"),
        ({"layer_ids": None}, "missing tensors ['layer_ids']"),
        ({"experts": np.zeros(2)}, "unknown tensors ['experts'], missing tensors []"),
        ({"topk_ids": np.zeros((2, 2, 2), np.int64)}, "topk_ids must be int16, got in"),
        ({"layer_ids": np.array([1.0, 2.0])}, "layer_ids must be int32, got float64"),
        ({"sequence": np.zeros(2, np.uint8)}, "sequence must be int32, got uint8"),
        ({"position": np.zeros(2, bool)}, "position must be int32, got bool"),
        ({"home_rank": np.zeros(2, np.int32)}, "home_rank must be int16, got int32"),
        ({"phase": np.zeros(2, np.int8)}, "phase must be uint8, got int8"),
        ({"topk_weights": np.zeros((2, 2, 2))}, "topk_weights must be float16 or flo"),
        ({"sequence": np.zeros(3, np.int32)}, "Trace: sequence must be int32 [2]"),
        ({"topk_ids": np.full((2, 2, 2), 7, np.uint8)}, "expert id 7 at token 0"),
    ],
)
def test_wrong_tensors_are_refused(tmp_path, tensors, message):
    with pytest.raises(InvalidTraceError, match=re.escape(message)) as caught:
        read(tmp_path, **tensors)
    assert str(caught.value).startswith(f"{tmp_path / 'some.trace'}: ")


def test_every_truncation_is_refused(tmp_path):
    read(tmp_path)
    whole = (tmp_path / "some.trace").read_bytes()
    for length in range(len(whole)):
        (tmp_path / "cut").write_bytes(whole[:length])
        with pytest.raises(InvalidTraceError, match="cut: "):
            read_trace(tmp_path / "cut")


def raw_file(path, header, data=b"", size=None):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text) if size is None else size) + text)
    with path.open("ab") as stream:
        stream.write(data)
    return path


def one_tensor(dtype, shape, end):
    ids = {"dtype": dtype, "shape": shape, "data_offsets": [0, end]}
    return {"__metadata__": HEADER, "topk_ids": ids}


BOMBS = [
    (b"{", "truncated, or not", 2**63),
    (b"{" + b" " * (1 << 21), "truncated, or not", None),
    (b'{"a":' * 100000, "not a safetensors file", None),
    (b"{]", "not a safetensors file", None),
    (b'{"__metadata__": 3}', "damaged safetensors metadata", None),
    (b"{\xff\xff}", "not a safetensors file", None),
    (one_tensor("I16", [2**40, 2, 2], 8), "damaged trace file", None),
    (one_tensor("I16", [2**40, 2, 2], 2**43), "damaged trace file", None),
    (one_tensor("I16", [2**62, 2**62, 2**62], 8), "damaged trace file", None),
    (one_tensor("I16", [-2, 2, -1], 8), "damaged trace file", None),
    (one_tensor("BF16", [2, 2, 1], 8), "damaged trace file: KeyError: 'BF16'", None),
    (one_tensor("O", [1], 8), "damaged trace file", None),
    (one_tensor("I16", [1, 2, 1], 4), "damaged trace file", None),
    (
        {"__metadata__": HEADER | {"num_experts": 4}},
        "damaged trace file: SafetensorError",
        None,
    ),
]


@pytest.mark.parametrize(("header", "message", "size"), BOMBS, ids=range(len(BOMBS)))
def test_headers_that_lie_are_refused(tmp_path, header, message, size):
    path = raw_file(tmp_path / "bomb", header, bytes(8), size)
    with pytest.raises(InvalidTraceError, match=re.escape(message)):
        read_trace(path)


def small_trace(model=""):
    return make_trace(
        TENSORS["topk_ids"].copy(), 4, metadata=TraceMetadata(model=model)
    )


def test_a_failed_write_leaves_the_old_file(tmp_path, monkeypatch):
    """The disk fills up after the new bytes were written."""
    path = tmp_path / "some.trace"
    write_trace(small_trace("old"), path)

    def full(_):
        raise OSError("disk full")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(OSError, match="disk full"):
            write_trace(small_trace("new"), path)
    assert read_trace(path).metadata.model == "old"
    assert list(tmp_path.iterdir()) == [path]
    write_trace(small_trace("new"), path)
    assert read_trace(path).metadata.model == "new"


def test_what_could_not_be_read_is_not_written(tmp_path):
    with pytest.raises(InvalidTraceError, match=r"shorten metadata\.extra"):
        write_trace(small_trace("x" * (1 << 20)), tmp_path / "a")
    assert not (tmp_path / "a").exists()
