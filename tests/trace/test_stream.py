from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from moetuner.errors import InvalidTraceError
from moetuner.trace import merge_traces, read_trace, select
from moetuner.trace.stream import TraceWriter
from strategies import full_traces, make_trace, random_ids


def blocks_of(trace, cuts):
    edges = [0, *sorted(cuts), trace.num_tokens]
    for start, stop in pairwise(edges):
        mask = np.zeros(trace.num_tokens, bool)
        mask[start:stop] = True
        yield select(trace, mask)


@settings(deadline=None)
@given(full_traces(max_tokens=12), st.lists(st.integers(0, 12), max_size=3))
def test_blocks_make_the_file_that_the_whole_makes(tmp_path_factory, trace, cuts):
    path = tmp_path_factory.mktemp("stream") / "trace.safetensors"
    cuts = [min(cut, trace.num_tokens) for cut in cuts]
    with TraceWriter(path, num_experts=trace.num_experts) as writer:
        for block in blocks_of(trace, cuts):
            writer.append(block)
        if not trace.num_tokens:
            with pytest.raises(InvalidTraceError, match="no token"):
                writer.finish()
            return
        writer.finish()
    read = read_trace(path)
    assert read.metadata == trace.metadata
    assert read.num_experts == trace.num_experts
    assert read.ranked == trace.ranked
    wanted = trace.arrays()
    assert read.arrays().keys() == wanted.keys()
    for name, array in read.arrays().items():
        assert array.dtype == wanted[name].dtype
        assert np.array_equal(array, wanted[name])


def test_a_field_must_be_in_every_block(tmp_path, rng):
    ids = random_ids(rng, 6, 2, 8, 2)
    sequence = np.zeros(6, np.int32)
    with TraceWriter(tmp_path / "t") as writer:
        writer.append(make_trace(ids, 8, sequence=sequence, position=sequence))
        writer.append(make_trace(ids, 8, sequence=sequence))
        writer.finish()
    read = read_trace(tmp_path / "t")
    assert read.position is None
    assert np.array_equal(read.sequence, np.zeros(12))
    parts = [make_trace(ids, 8)] * 2
    assert read.sha256() == merge_traces(parts).sha256()


def test_experts_are_counted_when_unknown(tmp_path, rng):
    ids = np.array([[[0, 300]], [[5, 2]]], np.int16)
    with TraceWriter(tmp_path / "t") as writer:
        writer.append(make_trace(ids, 32767))
        writer.finish()
    assert read_trace(tmp_path / "t").num_experts == 301


def test_other_shapes_are_refused_and_nothing_is_written(tmp_path, rng):
    with TraceWriter(tmp_path / "t", num_experts=8) as writer:
        writer.append(make_trace(random_ids(rng, 3, 2, 8, 2), 8))
        with pytest.raises(InvalidTraceError, match="changes shape"):
            writer.append(make_trace(random_ids(rng, 3, 2, 8, 3), 8))
        with pytest.raises(InvalidTraceError, match="outside"):
            writer.append(make_trace(np.full((1, 2, 2), [3, 9], np.int16), 16))
    assert list(tmp_path.iterdir()) == []
