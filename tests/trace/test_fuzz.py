"""Damaged files are refused, or still hold a legal trace; nothing else happens."""

import io
import zipfile

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from moetuner.errors import InvalidTraceError
from moetuner.trace import Trace, TraceMetadata, read_trace, write_trace
from strategies import examples, make_trace, random_ids

RNG = np.random.default_rng(5)
IDS = random_ids(RNG, 6, 2, 8, 2)
WEIGHTS = np.sort(RNG.random(IDS.shape).astype(np.float16), axis=2)[..., ::-1]


def archive(save, **arrays):
    stream = io.BytesIO()
    save(stream, **arrays)
    return stream.getvalue()


def own_file(folder):
    trace = make_trace(
        IDS.copy(),
        8,
        topk_weights=WEIGHTS.copy(),
        sequence=np.repeat([0, 1], 3).astype(np.int32),
        phase=np.zeros(6, np.uint8),
        ranked=True,
        metadata=TraceMetadata(model="m", extra={"a": "b"}),
    )
    write_trace(trace, folder / "seed")
    return (folder / "seed").read_bytes()


TOKENS = {
    "experts": IDS.astype(np.uint8),
    "weights": WEIGHTS,
    "seq": np.repeat([0, 1], 3),
    "pos": np.arange(6),
    "layer_ids": np.array([1, 2], np.int16),
    "meta": '{"model": "m", "experts": 8, "topk": 2}',
}
COUNTS = {
    "counts": np.arange(16, dtype=np.uint16).reshape(2, 2, 4),
    "tokens": np.array([3, 11]),
    "themes": np.array(["a", "b"]),
}
FORMATS = ["safetensors", "tokens", "packed", "counts"]


@pytest.fixture(scope="module")
def valid(tmp_path_factory):
    """A valid file of every kind, as bytes."""
    return {
        "safetensors": own_file(tmp_path_factory.mktemp("seed")),
        "tokens": archive(np.savez, **TOKENS),
        "packed": archive(np.savez_compressed, **TOKENS),
        "counts": archive(np.savez, **COUNTS),
    }


@st.composite
def edits(draw):
    """Bytes to change, each by its place as a share of the file, and where to cut."""
    places = st.tuples(st.floats(0, 1, exclude_max=True), st.integers(0, 255))
    changed = draw(st.lists(places, max_size=6))
    return changed, draw(st.just(1.0) | st.floats(0, 1))


def damaged(data, edit):
    changed, kept = edit
    copy = bytearray(data)
    for place, value in changed:
        copy[int(place * len(copy))] = value
    return bytes(copy[: round(kept * len(copy))])


def with_damaged_member(data, name, edit):
    """As an attacker would: one array is damaged, the archive around it is sound."""
    stream = io.BytesIO()
    with (
        zipfile.ZipFile(io.BytesIO(data)) as old,
        zipfile.ZipFile(stream, "w") as new,
    ):
        for member in old.namelist():
            array = old.read(member)
            new.writestr(member, damaged(array, edit) if member == name else array)
    return stream.getvalue()


def read_or_refuse(path, data):
    path.write_bytes(data)
    try:
        trace = read_trace(path)
    except InvalidTraceError:
        return None
    if isinstance(trace, Trace):  # what was let through can be kept
        write_trace(trace, path)
        assert read_trace(path).sha256() == trace.sha256()
    return trace


@pytest.mark.parametrize("kind", FORMATS)
def test_the_undamaged_file_is_read(tmp_path, valid, kind):
    assert read_or_refuse(tmp_path / "file", valid[kind]) is not None


@pytest.mark.parametrize("kind", FORMATS)
@examples(60)
@given(edit=edits())
def test_damage_is_refused_or_harmless(tmp_path_factory, valid, kind, edit):
    path = tmp_path_factory.mktemp("fuzz") / "file"
    read_or_refuse(path, damaged(valid[kind], edit))


@pytest.mark.parametrize("kind", ["tokens", "counts"])
@examples(120)
@given(data=st.data(), edit=edits())
def test_a_damaged_array_in_a_sound_archive(tmp_path_factory, valid, kind, data, edit):
    """So that the damage reaches NumPy's headers and what the arrays hold."""
    name = data.draw(st.sampled_from(list(TOKENS if kind == "tokens" else COUNTS)))
    path = tmp_path_factory.mktemp("fuzz") / "file"
    read_or_refuse(path, with_damaged_member(valid[kind], f"{name}.npy", edit))


@examples(60)
@given(place=st.floats(0, 1, exclude_max=True), insert=st.binary(max_size=8))
@pytest.mark.parametrize("kind", FORMATS)
def test_inserted_bytes_are_refused_or_harmless(
    tmp_path_factory, valid, kind, place, insert
):
    path = tmp_path_factory.mktemp("fuzz") / "file"
    at = int(place * len(valid[kind]))
    read_or_refuse(path, valid[kind][:at] + insert + valid[kind][at:])
