"""Loads that EPLB takes, in every container."""

import numpy as np
import pytest
from engine_files import FOLDER
from moetuner.errors import InvalidTraceError
from moetuner.trace import CountTrace
from safetensors.numpy import save_file


def test_eplb_weights_of_every_container(importing, tmp_path):
    load = np.arange(1, 13, dtype=np.int64).reshape(3, 4)
    np.save(tmp_path / "a.npy", load)
    np.savez(tmp_path / "a.npz", weight=load)
    save_file({"weight": load}, tmp_path / "a.safetensors")
    for name in ("a.npy", "a.npz", "a.safetensors"):
        trace = importing(tmp_path / name, format="eplb")
        assert isinstance(trace, CountTrace)
        assert trace.counts.tolist() == [load.tolist()]
    days = importing(tmp_path / "a.npy", tmp_path / "a.safetensors", format="eplb")
    assert days.num_groups == 2


def test_eplb_averages_keep_their_proportions(importing, tmp_path):
    load = np.array([[0.5, 1.25, 0.0], [3.0, 0.001, 2.0]])
    np.save(tmp_path / "a.npy", load)
    counts = importing(tmp_path / "a.npy").counts[0]
    np.testing.assert_allclose(counts / counts.sum(), load / load.sum(), atol=1e-11)
    assert "averages" in importing.notes[0]


@pytest.mark.parametrize(
    ("load", "message"),
    [
        (np.array([[1.0, np.nan]]), "finite"),
        (np.array([[1.0, np.inf]]), "finite"),
        (np.array([[1.0, -1.0]]), "router's scores"),
        (np.array([[1, -1]]), ">= 0, got -1"),
        (np.array([[2**60, 1]]), "counts must be 0"),
        (np.zeros((2, 3)), "counted nothing"),
        (np.zeros((2, 0)), r"\[2, 0\]"),
        (np.zeros(3), r"wanted a request's"),
    ],
)
def test_eplb_weights_are_checked(importing, tmp_path, load, message):
    np.save(tmp_path / "a.npy", load)
    with pytest.raises(InvalidTraceError, match=message):
        importing(tmp_path / "a.npy")


def test_eplb_scales_all_groups_alike(importing, tmp_path):
    """Also when some of them happen to be whole numbers, or to be tiny."""
    loads = [np.full((2, 4), 100.0), np.full((2, 4), 0.5), np.full((2, 4), 1.25)]
    for unit in (1.0, 1e-310, 1e306):
        for day, load in enumerate(loads):
            np.save(tmp_path / f"{day}.npy", load * unit)
        files = [tmp_path / f"{day}.npy" for day in range(3)]
        counts = importing(*files, format="eplb").counts
        sums = counts.sum(axis=(1, 2))
        np.testing.assert_allclose(sums / sums[0], [1, 0.005, 0.0125], rtol=1e-6)
    np.save(tmp_path / "stack.npy", np.stack(loads))
    stack = importing(tmp_path / "stack.npy", format="eplb").counts.sum(axis=(1, 2))
    np.testing.assert_allclose(stack / stack[0], [1, 0.005, 0.0125], rtol=1e-6)


def test_eplb_half_precision_adds_up(importing, tmp_path):
    np.save(tmp_path / "a.npy", np.full((1, 4), 60000, np.float16))
    assert importing(tmp_path / "a.npy").counts.tolist() == [[[60000] * 4]]


def test_eplb_placement_is_no_load(importing):
    with pytest.raises(InvalidTraceError, match="import-placement"):
        importing(FOLDER / "exports/eplb.safetensors")


def test_long_stacks_of_weights_are_folded(importing, tmp_path):
    np.save(tmp_path / "a.npy", np.ones((640, 2, 3), np.int32))
    trace = importing(tmp_path / "a.npy", format="eplb")
    assert trace.num_groups == 64
    assert trace.counts.sum() == 640 * 6
