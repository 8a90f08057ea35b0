"""Routed experts of requests: what servers leave out, and what hostile files hold."""

import base64
import io
import json

import numpy as np
import pytest
from moetuner.errors import InvalidTraceError
from moetuner.trace.importers import RecordingFormat, json_text, routed_experts

IDS = np.array([[[3, 1], [0, 2]], [[2, 0], [1, 3]]])  # two tokens, two layers, top-2


def npy(array, **options):
    stream = io.BytesIO()
    np.save(stream, array, **options)
    return stream.getvalue()


def b64(data):
    return base64.b64encode(data).decode()


def choice(ids, dtype=np.uint8):
    return {"choices": [{"routed_experts": b64(npy(np.asarray(ids, dtype)))}]}


def write(path, *lines):
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def test_rows_that_nobody_filled_are_no_tokens(importing, tmp_path):
    """Buffers of zeros are returned for dense layers, and for tokens not run yet."""
    ids = np.zeros((3, 3, 2), int)
    ids[:2, 1:] = IDS
    ids[1, 2] = 0  # one layer of the second token
    trace = importing(write(tmp_path / "a.jsonl", choice(ids)))
    assert trace.layer_ids.tolist() == [1, 2]
    assert trace.topk_ids.tolist() == [[[3, 1], [0, 2]], [[2, 0], [-1, -1]]]
    assert trace.position.tolist() == [0, 1]
    assert any("largest id plus one" in note for note in importing.notes)


def test_top_1_needs_no_guess_when_layers_are_told(importing, tmp_path):
    ids = np.zeros((4, 2, 1), int)
    ids[2:, 1] = 1
    path = write(tmp_path / "a.jsonl", choice(ids))
    trace = importing(path, layers=(1,), num_experts=4)
    assert trace.topk_ids.ravel().tolist() == [0, 0, 1, 1]


def test_every_place_of_a_response(importing, tmp_path):
    flat = b64(IDS.astype("<i4").tobytes())
    lines = [
        {"meta_info": {"routed_experts": flat, "prompt_tokens": 1}},
        [{"sglext": {"routed_experts": flat}, "usage": {"prompt_tokens": 1}}],
        {"routed_experts": b64(npy(IDS.astype(np.uint16))), "prompt_tokens": 1},
        {"text": "no routing here"},
    ]
    path = write(tmp_path / "a.jsonl", *lines)
    trace = importing(path, num_layers=2, top_k=2, num_experts=4)
    assert np.array_equal(trace.topk_ids, np.concatenate([IDS] * 3))
    assert trace.sequence.tolist() == [0, 0, 1, 1, 2, 2]
    assert trace.phase.tolist() == [0, 1] * 3
    assert importing.notes == ["1 response without routed experts: left out"]


def test_long_requests_come_in_blocks(importing, tmp_path, monkeypatch, rng):
    monkeypatch.setattr(routed_experts, "block_rows", lambda *_: 3)
    ids = np.argsort(rng.random((10, 2, 8)))[..., :2].astype(np.uint8)
    np.save(tmp_path / "a.npy", ids)
    trace = importing(tmp_path / "a.npy", num_experts=8)
    assert np.array_equal(trace.topk_ids, ids)
    assert trace.position.tolist() == list(range(10))
    assert trace.sha256() == importing(write(tmp_path / "a", choice(ids))).sha256()


def test_fortran_order(importing, tmp_path):
    ids = np.asfortranarray(IDS.astype(np.uint8))
    np.save(tmp_path / "a.npy", ids)
    assert np.array_equal(importing(tmp_path / "a.npy").topk_ids, IDS)
    path = write(tmp_path / "b", {"routed_experts": b64(npy(ids))})
    assert np.array_equal(importing(path).topk_ids, IDS)


def declares(shape):
    header = f"{{'descr': '|u1', 'fortran_order': False, 'shape': {shape}, }}\n"
    size = len(header).to_bytes(2, "little")
    return b"\x93NUMPY\x01\x00" + size + header.encode() + b"\1\2"


@pytest.mark.parametrize(
    ("encoded", "message"),
    [
        ("%%%", "not base64"),
        (5, "must be base64 text, lists, or an object"),
        (b64(npy(np.array([object()]), allow_pickle=True)), "pickled objects: refused"),
        (b64(declares((2**40, 2, 2))), "declares"),
        (b64(declares((-1, 2, 2))), "declares"),
        (b64(declares((2, 0, 2))), "declares"),
        (b64(declares((1, 2))), r"must be integers \[tokens"),
        (b64(npy(np.ones((1, 1, 2)))), "must be integers"),
        (b64(npy(np.array([[[1, 1]]]))), "twice"),
        (b64(npy(np.array([[[1, 9]]]))), "outside 0..7"),
        (b64(npy(np.array([[[1, 2**20]]]))), "expert ids must be"),
        (b64(b"\x93NUMPY\x01\x00\xff\xff"), "damaged .npy header"),
        (b64(npy(IDS))[:-8], "declares"),
        (b64(b"12345678"), "`num_layers`"),
    ],
)
def test_hostile_answers(importing, tmp_path, encoded, message):
    path = write(tmp_path / "a.jsonl", {"routed_experts": encoded})
    with pytest.raises(InvalidTraceError, match=message):
        importing(path, num_experts=8)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (b'{"routed_experts": ', "not JSON"),
        (b'{"routed_experts": "a"' + b"[" * 100_000, "not JSON"),
        (b'{"a": ' + b"[" * 200_000 + b"]" * 200_000 + b"}", "not JSON"),
        (b"[[1]]", "a JSON object, got a list"),
        (b"7", "a JSON object, got int"),
        (b'{"choices": 7}', "no response has routed experts"),
        (b"\n\n", "no response has routed experts"),
    ],
)
def test_hostile_lines(importing, tmp_path, line, message):
    path = tmp_path / "a.jsonl"
    path.write_bytes(line + b"\n")
    with pytest.raises(InvalidTraceError, match=message):
        importing(path, format="routed-responses")


def test_lines_that_would_fill_the_memory_are_refused(importing, tmp_path, monkeypatch):
    path = write(tmp_path / "a.jsonl", {"routed_experts": "", "x": list(range(99))})
    monkeypatch.setattr(json_text, "MAX_LINE_VALUES", 50)
    with pytest.raises(InvalidTraceError, match="more than 50 values"):
        importing(path)
    monkeypatch.setattr(json_text, "MAX_LINE_BYTES", 100)
    with pytest.raises(InvalidTraceError, match="longer than 100 bytes"):
        importing(path)


def test_shapes_must_agree(importing, tmp_path):
    path = write(tmp_path / "a", choice(IDS), choice(IDS[:, :1]))
    with pytest.raises(InvalidTraceError, match="responses change shape"):
        importing(path)
    flat = {"routed_experts": b64(b"\0" * 20)}
    with pytest.raises(InvalidTraceError, match="no whole rows"):
        importing(write(tmp_path / "b", flat), num_layers=2, top_k=2)


def test_whole_floats_are_ids_and_others_are_refused(importing, tmp_path):
    """Tools without integers write them; NaN and halves are no ids."""
    ids = np.argsort(np.random.default_rng(0).random((20, 3, 16)))[..., :2]
    asked = {"format": RecordingFormat.ROUTED_ARRAYS, "num_experts": 16}
    traces = []
    for name, array in (("ids", ids), ("floats", ids.astype(np.float32))):
        np.save(tmp_path / f"{name}.npy", array)
        traces.append(importing(tmp_path / f"{name}.npy", **asked))
    assert np.array_equal(traces[0].topk_ids, traces[1].topk_ids)
    for bad in (0.5, np.nan, np.inf, 1e20):
        wrong = ids.astype(np.float32)
        wrong[3, 1, 0] = bad
        np.save(tmp_path / "bad.npy", wrong)
        with pytest.raises(InvalidTraceError):
            importing(tmp_path / "bad.npy", **asked)
