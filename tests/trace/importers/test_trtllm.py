"""TensorRT-LLM's files beyond what its own code wrote."""

import shutil

import numpy as np
import pytest
from engine_files import FOLDER
from moetuner.errors import InvalidTraceError
from recordings import COUNTS, statistics
from safetensors.numpy import save_file


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        ({"1_0": COUNTS[:3]}, r"must be \[4\], got \[3\]"),
        ({"1_0": -COUNTS}, "counts must be 0"),
        ({"1_0": COUNTS * np.nan}, "finite"),
        ({"1_0": COUNTS / 2}, "whole numbers"),
        ({"layer": COUNTS}, "names like '100_3'"),
        ({"1_0": COUNTS, "2_1": COUNTS}, "different layers"),
        ({"1_0": COUNTS * 0}, "counted nothing"),
    ],
)
def test_trtllm_counts_are_checked(importing, tmp_path, tensors, message):
    with pytest.raises(InvalidTraceError, match=message):
        importing(statistics(tmp_path / "s", tensors))


@pytest.mark.parametrize(
    ("meta", "message"),
    [
        ({"num_experts": 4}, "num_experts_per_token must be a number"),
        ({"num_experts": 10**9, "num_experts_per_token": 2}, "must be 1..32767"),
        ({"num_experts": "4", "num_experts_per_token": 2}, "must be a number"),
        ([4], "wanted a JSON object"),
    ],
)
def test_trtllm_meta_is_checked(importing, tmp_path, meta, message):
    with pytest.raises(InvalidTraceError, match=message):
        importing(statistics(tmp_path / "s", {"1_0": COUNTS}, meta))


def test_trtllm_raw_names_of_both_versions(importing, tmp_path):
    folder = shutil.copytree(FOLDER / "trtllm", tmp_path / "s")
    wanted = importing(folder).sha256()
    for rank in (0, 1):
        old = folder / f"token_selected_experts_rank{rank}.safetensors"
        old.rename(folder / f"rank{rank}_raw.safetensors")
    assert importing(folder).sha256() == wanted


def test_trtllm_layers_of_different_length(importing, tmp_path):
    ids = np.array([[0, 1], [2, 3]], np.int32)
    folder = statistics(
        tmp_path / "s", {"1_0": ids, "1_1": ids[:1]}, name="rank0_raw.safetensors"
    )
    with pytest.raises(InvalidTraceError, match="wanted the same"):
        importing(folder)


def test_trtllm_slots_become_experts(importing, tmp_path):
    """With a load balancer TensorRT-LLM records slots, and calls them experts."""
    slots = {3: np.array([1, 0, 2, 2]), 5: np.array([0, 1, 2, 0])}
    meta = {"num_experts": 4, "num_experts_per_token": 2}
    folder = statistics(tmp_path / "s", {"1_3": COUNTS, "1_5": COUNTS}, meta)
    trace = importing(folder, slot_experts=slots)
    assert trace.counts.tolist() == [[[2, 1, 3 + 4], [1 + 4, 2, 3]]]
    ids = np.array([[0, 2], [3, -1]], np.int32)
    save_file({"1_3": ids, "1_5": ids}, folder / "rank0_raw.safetensors")
    trace = importing(folder, slot_experts=slots)
    assert trace.topk_ids.tolist() == [[[1, 2], [0, 2]], [[2, -1], [0, -1]]]
    assert trace.num_experts == 3
    importing(folder)
    assert "taken as experts" in importing.notes[-1]
    for wrong, message in (
        ({3: slots[3]}, "no layer 5"),
        ({3: slots[3][:2]}, "of 4 ids, the placement has"),
        ({3: np.array([0, 1, 2, -1])}, "empty slots"),
    ):
        with pytest.raises(InvalidTraceError, match=message):
            importing(folder, slot_experts=wrong)


def test_trtllm_stages_of_a_pipeline_are_joined(importing, tmp_path):
    """Ranks that recorded other layers: the first rank of each stage is one."""
    folder = tmp_path / "s"
    for rank in range(4):
        layers = (3, 5) if rank < 2 else (6,)
        tensors = {f"1_{layer}": COUNTS * (rank + layer) for layer in layers}
        statistics(folder, tensors, name=f"rank{rank}.safetensors")
    trace = importing(folder)
    assert trace.layer_ids.tolist() == [3, 5, 6]
    wanted = [COUNTS * 7, COUNTS * 11, COUNTS * 17]
    assert trace.counts.tolist() == [np.array(wanted).tolist()]
    ids = np.array([[0, 1], [2, 3]], np.int32)
    for rank in range(4):
        layers = (3, 5) if rank < 2 else (6,)
        tensors = {f"1_{layer}": (ids + rank) % 4 for layer in layers}
        save_file(tensors, folder / f"rank{rank}_raw.safetensors")
    trace = importing(folder)
    assert trace.home_rank.tolist() == [0, 0, 1, 1]
    assert trace.topk_ids[0].tolist() == [[0, 1], [0, 1], [2, 3]]
    (folder / "rank3_raw.safetensors").unlink()
    with pytest.raises(InvalidTraceError, match="no stages of a pipeline"):
        importing(folder)
