"""Recordings that the engines' own code wrote are read as what went into them.

`tests/fixtures/engines/README.md` says which code of which version wrote them.
"""

import json
import shutil

import numpy as np
import pytest
from engine_files import FOLDER, reference_load, reference_trace
from moetuner.trace import CountTrace
from moetuner.trace.importers import RecordingFormat, detect_format

REFERENCE = reference_trace()
# passes of the SGLang recording: tokens of each rank, in the order of time
SGLANG_ORDER = [
    token
    for start, stop in ((0, 9), (9, 11), (11, 12))
    for rank in range(4)
    for token in range(12 * rank + start, 12 * rank + stop)
]
TRTLLM_ORDER = [
    24 * r + 12 * i + t for i in range(2) for r in range(2) for t in range(12)
]


def as_sets(ids):
    return np.sort(ids, axis=2)


@pytest.mark.parametrize(
    ("name", "order", "options"),
    [
        ("sglang/responses.jsonl", range(48), {"num_layers": 4, "top_k": 4}),
        ("vllm/responses.jsonl", range(48), {}),
        ("trtllm", TRTLLM_ORDER, {}),
        ("megatron", TRTLLM_ORDER, {}),
        pytest.param("sglang/per_token", SGLANG_ORDER, {}, id="sglang/per_token"),
    ],
)
def test_tokens(importing, name, order, options):
    if name == "sglang/per_token":
        pytest.importorskip("torch")
    trace = importing(FOLDER / name, model="demo", **options)
    assert trace.layer_ids.tolist() == [1, 2, 3]
    assert trace.num_experts == 64
    assert trace.metadata.model == "demo"
    assert np.array_equal(
        as_sets(trace.topk_ids), as_sets(REFERENCE.topk_ids[list(order)])
    )
    assert importing.result.missing == ()


def test_sglang_per_token_keeps_ranks_phases_and_prompts(importing):
    pytest.importorskip("torch")
    trace = importing(FOLDER / "sglang/per_token")
    assert trace.home_rank.tolist() == [t // 12 for t in SGLANG_ORDER]
    assert trace.phase.tolist() == [0] * 36 + [1] * 12
    # each rank prefills prompts of 5 and 4 tokens, then decodes two, then one
    first = [0] * 5 + [1] * 4
    assert trace.sequence[:9].tolist() == first
    assert trace.sequence[9:18].tolist() == [2 + s for s in first]
    assert trace.position[:9].tolist() == [0, 1, 2, 3, 4, 0, 1, 2, 3]
    assert trace.num_sequences == 4 * 2 + 4 + 4


@pytest.mark.parametrize("mode", ["per_pass", "stat"])
def test_sglang_counts(importing, mode):
    pytest.importorskip("torch")
    trace = importing(FOLDER / "sglang" / mode, top_k=4)
    assert isinstance(trace, CountTrace)
    assert np.array_equal(trace.counts.sum(axis=0), reference_load())
    assert trace.num_tokens.tolist() == [36, 8, 4]  # of the three forward passes
    assert trace.layer_ids.tolist() == [1, 2, 3]
    assert importing.result.missing == ("coactivation", "transitions")


def test_vllm_arrays_are_the_responses(importing):
    arrays = importing(*sorted(FOLDER.glob("vllm/request*.npy")), num_experts=64)
    responses = importing(FOLDER / "vllm/responses.jsonl")
    assert np.array_equal(arrays.topk_ids, responses.topk_ids)
    assert arrays.sequence.tolist() == responses.sequence.tolist()
    assert responses.phase.tolist() == 2 * ([0] * 20 + [1] * 4)  # 20 prompt tokens


def test_trtllm_counts(importing):
    trace = importing(FOLDER / "trtllm_counts")
    assert np.array_equal(trace.counts.sum(axis=0), reference_load())
    assert trace.num_tokens.tolist() == [24, 24]
    assert trace.layer_ids.tolist() == [1, 2, 3]


def test_trtllm_and_megatron_keep_ranks(importing):
    wanted = [t // 24 for t in TRTLLM_ORDER]
    assert importing(FOLDER / "trtllm").home_rank.tolist() == wanted
    assert importing(FOLDER / "megatron").home_rank.tolist() == wanted


def test_eplb_weight_of_torch(importing):
    pytest.importorskip("torch")
    trace = importing(FOLDER / "eplb/weight.pt")
    load = np.load(FOLDER / "load.npy")
    assert np.array_equal(trace.counts[0], load)
    assert np.array_equal(importing(FOLDER / "load.npy").counts[0], load)


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("sglang/per_token", "sglang-recorder"),
        ("sglang/per_token/expert_distribution_recorder_0_1.pt", "sglang-recorder"),
        ("sglang/stat/expert_distribution_recorder_0.pt", "sglang-recorder"),
        ("sglang/responses.jsonl", "routed-responses"),
        ("vllm/responses.jsonl", "routed-responses"),
        ("vllm/request0.npy", "routed-arrays"),
        ("trtllm", "trtllm"),
        ("megatron", "megatron"),
        ("megatron/router_trace_rank1.jsonl", "megatron"),
        ("eplb/weight.pt", "eplb"),
        ("load.npy", "eplb"),
    ],
)
def test_formats_are_told_by_content(name, kind, tmp_path):
    path = FOLDER / name
    if path.is_file():  # by content, not by name
        path = shutil.copy(path, tmp_path / "nameless")
    assert detect_format(path) is RecordingFormat(kind)


def test_multi_token_prediction_is_left_out(importing):
    lines = (FOLDER / "megatron/router_trace_rank0.jsonl").read_text().splitlines()
    blocks = [json.loads(line)["block"] for line in lines]
    assert blocks.count("mtp") == 1  # and no token of it is in `test_tokens`
