"""NumPy's archives of many arrays."""

import json

import numpy as np
import pytest
from moetuner.errors import InvalidTraceError
from moetuner.trace import read_trace
from moetuner.trace.importers import npz_file
from strategies import random_ids


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_archives_are_read_in_blocks(importing, tmp_path, monkeypatch, rng, save):
    monkeypatch.setattr(npz_file, "block_rows", lambda *_: 7)
    ids = random_ids(rng, 40, 3, 16, 4)
    save(
        tmp_path / "a.npz",
        experts=ids,
        weights=rng.random(ids.shape).astype(np.float16),
        seq=np.arange(40) // 10,
        pos=np.arange(40) % 10,
        layer_ids=np.array([2, 4, 6]),
        meta=json.dumps({"experts": 16}),
    )
    trace, whole = (
        importing(tmp_path / "a.npz", num_experts=16),
        read_trace(tmp_path / "a.npz"),
    )
    for name, array in whole.arrays().items():
        assert np.array_equal(trace.arrays()[name], array)
    assert trace.ranked
    assert trace.metadata == whole.metadata
    renamed = importing(tmp_path / "a.npz", num_experts=16, model="m", dataset="d")
    assert (renamed.metadata.model, renamed.metadata.dataset) == ("m", "d")


def test_real_archives_are_the_same_imported_or_read(importing, traces_dir):
    path = next((traces_dir / "gpt-oss-20b-fingerprinting").glob("*.npz"))
    whole = read_trace(path)
    assert importing(path, num_experts=whole.num_experts).sha256() == whole.sha256()


@pytest.mark.parametrize("name", ["seq", "weights"])
def test_archives_of_unequal_arrays_are_refused(importing, tmp_path, rng, name):
    ids = random_ids(rng, 6, 2, 8, 2)
    other = {"seq": np.zeros(5, int), "weights": np.ones((5, 2, 2), np.float16)}
    np.savez(tmp_path / "a.npz", experts=ids, **{name: other[name]})
    with pytest.raises(InvalidTraceError, match="differ in their number of tokens"):
        importing(tmp_path / "a.npz")


def test_counts_of_archives_are_of_as_many_experts_as_told(importing, tmp_path):
    np.savez(tmp_path / "a.npz", counts=np.ones((1, 2, 4), np.int64))
    with pytest.raises(InvalidTraceError, match="`num_experts` is 8"):
        importing(tmp_path / "a.npz", num_experts=8)


def test_archives_say_how_many_experts_there_are(importing, tmp_path, rng):
    ids = random_ids(rng, 40, 3, 9, 2)
    np.savez(tmp_path / "a.npz", experts=ids, meta=json.dumps({"experts": 64}))
    assert importing(tmp_path / "a.npz").num_experts == 64
    for options, message in (
        ({"num_experts": 32}, "the archive says 64"),
        ({"top_k": 3}, "the archive has 2"),
        ({"layers": (1, 2)}, "layer 0 routes tokens"),
    ):
        with pytest.raises(InvalidTraceError, match=message):
            importing(tmp_path / "a.npz", **options)
    named = importing(tmp_path / "a.npz", layers=(3, 4, 7), top_k=2, num_experts=64)
    assert named.layer_ids.tolist() == [3, 4, 7]
    np.savez(tmp_path / "b.npz", experts=ids, layer_ids=[1, 2, 3])
    with pytest.raises(InvalidTraceError, match="the archive says"):
        importing(tmp_path / "b.npz", layers=(3, 4, 7))


def test_archives_with_rows_of_dense_layers(importing, tmp_path, rng):
    ids = np.zeros((40, 4, 2), np.int16)
    ids[:30, 1:] = random_ids(rng, 30, 3, 9, 2)
    weights = rng.random(ids.shape).astype(np.float16)
    seq = np.arange(40) // 10
    np.savez(tmp_path / "a.npz", experts=ids, weights=weights, seq=seq)
    trace = importing(tmp_path / "a.npz", num_experts=9)
    assert trace.layer_ids.tolist() == [1, 2, 3]
    assert trace.num_tokens == 30
    assert trace.sequence.tolist() == seq[:30].tolist()
    assert trace.topk_weights.shape == (30, 3, 2)
    assert np.array_equal(np.sort(trace.topk_ids), np.sort(ids[:30, 1:]))


def test_counts_of_archives_take_top_k_and_layers(importing, tmp_path):
    counts = np.zeros((2, 4, 6), int)
    counts[:, 2:] = 2
    np.savez(tmp_path / "a.npz", counts=counts)
    trace = importing(tmp_path / "a.npz", top_k=4, layers=(5, 8))
    assert trace.num_tokens.tolist() == [3, 3]
    assert trace.layer_ids.tolist() == [5, 8]
    assert importing.result.tokens_known
    importing(tmp_path / "a.npz")
    assert not importing.result.tokens_known
    assert any("`top_k` says it" in note for note in importing.notes)
    with pytest.raises(InvalidTraceError, match="names 3 layers"):
        importing(tmp_path / "a.npz", layers=(5, 8, 9))


def test_hints_are_noted(importing, tmp_path, rng):
    ids = random_ids(rng, 400, 3, 8, 2)
    ids = np.concatenate([ids, np.full((400, 3, 1), 8, np.int16)], axis=2)
    np.savez(tmp_path / "a.npz", experts=ids)
    importing(tmp_path / "a.npz")
    assert any("every token has expert 8" in note for note in importing.notes)
    np.savez(tmp_path / "c.npz", counts=np.full((1, 2, 2), 100))
    importing(tmp_path / "c.npz", top_k=2)
    assert any("every token has expert 0" in note for note in importing.notes)
