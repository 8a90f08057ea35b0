import json
import re

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st
from moetuner.errors import InvalidTraceError
from moetuner.trace import CountTrace, Trace, read_trace
from moetuner.trace.counts import with_top_k
from strategies import traces

IDS = np.array([[[0, 1], [2, 3]], [[3, 0], [1, 2]]], np.uint8)
COUNTS = np.arange(24).reshape(2, 3, 4)
COUNTS_META = json.dumps({"model": "m", "topk": 2})


def read(tmp_path, **arrays):
    np.savez(tmp_path / "some.npz", **arrays)
    return read_trace(tmp_path / "some.npz")


def test_every_real_archive_is_read_as_numpy_reads_it(traces_dir):
    paths = sorted(traces_dir.glob("*/*.npz"))
    assert paths
    for path in paths:
        with np.load(path, allow_pickle=False) as archive:
            raw = {name: archive[name] for name in archive.files}
        trace = read_trace(path)
        assert trace.metadata.source == path.parent.name
        if "experts" in raw:
            check_tokens(trace, raw)
        else:
            check_counts(trace, raw)


def check_tokens(trace, raw):
    assert isinstance(trace, Trace)
    meta = json.loads(str(raw["meta"]))
    assert (trace.num_experts, trace.top_k) == (meta["experts"], meta["topk"])
    assert trace.metadata.model == meta["model"]
    np.testing.assert_array_equal(trace.layer_ids, raw["layer_ids"])
    np.testing.assert_array_equal(trace.sequence, raw["seq"])
    np.testing.assert_array_equal(trace.position, raw["pos"])
    np.testing.assert_array_equal(
        np.sort(trace.topk_ids, axis=2), np.sort(raw["experts"], axis=2)
    )
    assert trace.ranked == ("weights" in raw)
    if "weights" not in raw:
        np.testing.assert_array_equal(trace.topk_ids, raw["experts"])
        return
    assert (np.diff(trace.topk_weights.astype(np.float32), axis=2) <= 0).all()
    # Each expert keeps its own weight: compare the rows as expert -> weight tables.
    shape = (trace.num_tokens, trace.num_layers, trace.num_experts)
    read_table, raw_table = np.zeros(shape, np.float16), np.zeros(shape, np.float16)
    np.put_along_axis(read_table, trace.topk_ids.astype(int), trace.topk_weights, 2)
    np.put_along_axis(raw_table, raw["experts"].astype(int), raw["weights"], 2)
    np.testing.assert_array_equal(read_table, raw_table)


def check_counts(trace, raw):
    assert isinstance(trace, CountTrace)
    assert trace.missing == ("coactivation", "transitions")
    key = next((k for k in ("counts", "load") if k in raw), None)
    if key is None:
        tables = [raw[label] for label in trace.labels]
        np.testing.assert_array_equal(trace.counts, tables)
    else:
        np.testing.assert_array_equal(trace.counts, raw[key])
    if "layers" in raw:
        np.testing.assert_array_equal(trace.layer_ids, raw["layers"])
    if "tokens" in raw:
        np.testing.assert_array_equal(trace.num_tokens, raw["tokens"])


def test_a_single_real_array_is_refused_with_the_reason(traces_dir):
    path = traces_dir / "mixtral-8x7b-offloading-residency" / "expert_frequencies.npy"
    with pytest.raises(InvalidTraceError, match=r"frequencies\.npy: a single NumPy ar"):
        read_trace(path)


def test_the_strongest_expert_comes_first(tmp_path):
    """Ties keep the order of the source."""
    weights = np.array([[[0.25, 0.75], [0.5, 0.5]], [[1, 0], [0, 1]]], np.float32)
    trace = read(tmp_path, experts=IDS, weights=weights)
    assert trace.topk_ids.tolist() == [[[1, 0], [2, 3]], [[3, 0], [2, 1]]]
    assert trace.topk_weights[0].tolist() == [[0.75, 0.25], [0.5, 0.5]]
    assert trace.ranked


def test_what_an_archive_does_not_say(tmp_path):
    """Experts up to the largest id, layers from 0, no sequences, no ranking."""
    trace = read(tmp_path, experts=IDS)
    assert (trace.num_experts, trace.ranked, trace.sequence) == (4, False, None)
    assert trace.layer_ids.tolist() == [0, 1]
    assert trace.metadata.dataset == "some"


@given(traces())
def test_layout_and_integer_type_do_not_matter(tmp_path_factory, trace):
    """Fortran order, big-endian and 64-bit ids read as the same trace."""
    zeros = (trace.topk_ids == 0).all(axis=(1, 2))
    assume(trace.top_k > 1 or not zeros.any())  # nobody wrote those
    folder = tmp_path_factory.mktemp("layout")
    meta = json.dumps({"experts": trace.num_experts})
    for ids in (
        np.asfortranarray(trace.topk_ids),
        trace.topk_ids.astype(">i4"),
        trace.topk_ids.astype(np.int64),
    ):
        arrays = {"seq": trace.sequence.astype(">i8"), "layer_ids": trace.layer_ids}
        other = read(folder, experts=ids, meta=meta, **arrays)
        assert other.sha256() == trace.sha256()
        np.testing.assert_array_equal(other.sequence, trace.sequence)


def test_counts_per_group(tmp_path):
    counts = read(tmp_path, counts=COUNTS, themes=np.array(["a", "b"]))
    assert counts.labels == ("a", "b")
    assert counts.top_k is None  # nobody says, so choices stand there, not tokens
    assert counts.num_tokens.tolist() == [38, 86]
    # 19 and 43 tokens of the fullest layer chose two experts each.
    assert read(tmp_path, load=COUNTS, meta=COUNTS_META).num_tokens.tolist() == [19, 43]
    told = read(tmp_path, counts=COUNTS, tokens=np.array([4, 30], np.uint8))
    assert told.num_tokens.tolist() == [4, 30]


def test_named_tables_are_groups(tmp_path):
    base, tuned = COUNTS
    counts = read(tmp_path, base=base, tuned=tuned, layers=np.array([0, 7, 15]))
    assert counts.labels == ("base", "tuned")
    assert counts.layer_ids.tolist() == [0, 7, 15]
    np.testing.assert_array_equal(counts.counts, COUNTS)


TEXT = np.array(["a", "b"])
# Code points that no string may hold, in either byte order.
BEYOND = np.array([0x22, 0x110000, 0x22], np.uint32).view("U3")

REFUSED = [
    ({"experts": IDS[0]}, "experts must be [tokens, layers, top_k], got [2, 2]"),
    ({"experts": IDS.astype(float)}, "experts must be integers, got float64"),
    ({"experts": IDS.astype(bool)}, "experts must be integers, got bool"),
    (
        {"experts": IDS.astype(int) + 40000},
        "experts has values 40000..40003, beyond int16",
    ),
    ({"experts": IDS.astype(np.uint64) + 2**63}, "beyond int16"),
    ({"experts": IDS.astype(np.int8) - 2}, "expert id -2 at token 0"),
    ({"experts": np.ones((2, 2, 2), int)}, "token 0 lists expert 1 twice"),
    ({"experts": np.zeros((0, 2**40, 2), np.uint8)}, "wanted at most 65536 layers"),
    ({"experts": IDS, "meta": '{"experts": 3}'}, "expert id 3 at token 0"),
    ({"experts": IDS, "meta": '{"experts": "4"}'}, "meta 'experts' must be a number"),
    ({"experts": IDS, "meta": '{"experts": true}'}, "meta 'experts' must be a number"),
    ({"experts": IDS, "meta": '{"experts": 1e3}'}, "meta 'experts' must be a number"),
    ({"experts": IDS, "meta": "[1]"}, "meta must be a JSON object, got list"),
    ({"experts": IDS, "meta": "{"}, "meta is not JSON"),
    ({"experts": IDS, "meta": "[" * 100000}, "meta is not JSON"),
    ({"experts": IDS, "meta": np.arange(3)}, "meta is not JSON"),
    ({"experts": IDS, "meta": r'{"model": "\ud800"}'}, "model is not Unicode text"),
    ({"experts": IDS, "meta": BEYOND[0]}, "meta.npy is not Unicode text"),
    ({"experts": IDS, "meta": BEYOND.astype(">U3")}, "meta.npy is not Unicode text"),
    ({"experts": IDS, "weights": IDS}, "weights must be float16 or float32 [2, 2, 2]"),
    ({"experts": IDS, "weights": IDS > 1}, "got bool [2, 2, 2]"),
    ({"experts": IDS, "weights": TEXT}, "got <U1 [2]"),
    ({"experts": IDS, "weights": np.full((2, 2, 2), np.nan, "f4")}, "got nan at token"),
    ({"experts": IDS, "seq": np.zeros(3, int)}, "sequence must be int32 [2]"),
    ({"experts": IDS, "seq": np.array([0, 2**32])}, "seq has values 0..4294967296, b"),
    ({"experts": IDS, "pos": np.zeros(2)}, "pos must be integers, got float64"),
    ({"experts": IDS, "layer_ids": np.array([1, 2**40])}, "layer_ids has values 1.."),
    ({"experts": IDS, "layer_ids": np.array([2, 1])}, "strictly increasing"),
    ({"counts": COUNTS - 1}, "counts must be >= 0, got -1"),
    ({"counts": COUNTS.astype(np.uint64) << 60}, "beyond int64"),
    ({"counts": COUNTS + 2**50}, "counts must add up to at most 2**53"),
    ({"counts": COUNTS[0, 0]}, "counts must be [groups, layers, experts]"),
    ({"counts": COUNTS[:0]}, "none of them empty, got [0, 3, 4]"),
    ({"counts": COUNTS, "tokens": np.arange(3)}, "tokens must be [2], one number"),
    ({"counts": COUNTS, "themes": TEXT[:1]}, "themes must be text [2], one per group"),
    ({"counts": COUNTS, "themes": np.array("a")}, "themes must be text [2]"),
    ({"counts": COUNTS, "themes": np.array([1, 2])}, "got int64 [2]"),
    ({"counts": COUNTS, "meta": '{"topk": 0}'}, "meta 'topk' must be a number in 1.."),
    ({"counts": COUNTS, "meta": f'{{"topk": {10**30}}}'}, "meta 'topk' must be a numb"),
    ({"a": COUNTS[0], "b": COUNTS[0, :2]}, "no routing found: wanted 'experts'"),
    ({"a": COUNTS[0].astype(float)}, "a must be integers, got float64"),
    ({"tokens": np.arange(3)}, "the archive has ['tokens']"),
    ({}, "no routing found"),
]


@pytest.mark.parametrize(("arrays", "message"), REFUSED)
def test_arrays_that_are_no_routing_are_refused(tmp_path, arrays, message):
    if not arrays:  # NumPy writes an empty archive without the local header
        (tmp_path / "some.npz").write_bytes(b"PK\x05\x06" + bytes(18))
    else:
        np.savez(tmp_path / "some.npz", **arrays)
    with pytest.raises(InvalidTraceError, match=re.escape(message)) as caught:
        read_trace(tmp_path / "some.npz")
    assert str(caught.value).startswith(f"{tmp_path / 'some.npz'}: ")


@given(st.binary(max_size=40))
def test_other_files_are_refused(tmp_path_factory, data):
    path = tmp_path_factory.mktemp("other") / "some.npz"
    path.write_bytes(data)
    with pytest.raises(InvalidTraceError, match=re.escape(str(path))):
        read_trace(path)


def test_absent_files_and_folders(tmp_path):
    with pytest.raises(FileNotFoundError):
        read_trace(tmp_path / "absent.npz")
    with pytest.raises(InvalidTraceError, match="a folder, wanted a trace file"):
        read_trace(tmp_path)


def test_one_matrix_of_counts_is_one_group(tmp_path):
    assert read(tmp_path, counts=COUNTS[0]).counts.tolist() == COUNTS[:1].tolist()


def test_layers_that_counted_nothing_are_dense(tmp_path):
    counts = np.zeros((2, 4, 4), int)
    counts[:, 2:] = [[4, 0, 0, 4], [0, 4, 4, 0]]
    trace = with_top_k(read(tmp_path, counts=counts), 4)
    assert trace.layer_ids.tolist() == [2, 3]
    assert trace.num_tokens.tolist() == [2, 2]
    with pytest.raises(InvalidTraceError, match="says 4 experts per token"):
        with_top_k(trace, 2)


def test_rows_that_nobody_wrote_are_padding(tmp_path):
    """With one expert per token too, where a token reads 0 at every layer."""
    ids = np.zeros((3, 3, 1), int)
    ids[0, 1:] = 5
    ids[1, 1] = 2
    trace = read(tmp_path, experts=ids, meta='{"experts": 8}')
    assert trace.layer_ids.tolist() == [1, 2]
    assert trace.topk_ids.ravel().tolist() == [5, 5, 2, 0, -1, -1]


@pytest.mark.parametrize("name", ["num_experts", "experts"])
def test_the_archive_says_how_many_experts_there_are(tmp_path, name):
    assert read(tmp_path, experts=IDS, meta=f'{{"{name}": 9}}').num_experts == 9
    with pytest.raises(InvalidTraceError, match="meta says 9 experts"):
        read(tmp_path, counts=COUNTS, meta=f'{{"{name}": 9}}')


def test_tables_that_are_no_loads_are_refused(tmp_path, rng):
    ids = np.argsort(rng.random((50, 16)))[:, :4]
    with pytest.raises(InvalidTraceError, match="may hold loads"):
        read(tmp_path, chosen=ids)
