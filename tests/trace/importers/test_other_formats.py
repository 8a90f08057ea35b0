"""What is no recording, options, and what holds for several formats."""

import numpy as np
import pytest
from engine_files import FOLDER
from moetuner.errors import InvalidTraceError
from moetuner.trace import read_trace, write_trace
from moetuner.trace.importers import detect_format
from recordings import megatron, statistics
from safetensors.numpy import load_file
from strategies import make_trace, random_ids


def test_what_is_no_recording_says_so(importing, tmp_path, rng):
    trace = make_trace(random_ids(rng, 6, 2, 8, 2), 8)
    write_trace(trace, tmp_path / "own.safetensors")
    (tmp_path / "text").write_text("hello there, this is a text")
    (tmp_path / "plan.json").write_text('{"format": "moetuner.placement"}')
    (tmp_path / "lines.jsonl").write_text('{"a": 1}\n')
    (tmp_path / "empty").touch()
    (tmp_path / "folder").mkdir()
    np.save(tmp_path / "ids.npy", np.zeros((2, 2, 2), np.int64))
    for name, message in {
        "own.safetensors": "a trace of moetuner already",
        "text": "no recording that moetuner knows",
        "plan.json": "a placement, not a recording",
        "lines.jsonl": "neither 'routed_experts'",
        "empty": "an empty file",
        "folder": "a folder without meta_info.json",
        "ids.npy": r"`format` eplb.*`format` rank-loads",
    }.items():
        with pytest.raises(InvalidTraceError, match=message):
            detect_format(tmp_path / name)
    with pytest.raises(InvalidTraceError, match="import their folder"):
        detect_format(FOLDER / "trtllm/rank0.safetensors")
    with pytest.raises(InvalidTraceError, match="different kinds"):
        importing(FOLDER / "load.npy", FOLDER / "vllm/request0.npy")
    with pytest.raises(FileNotFoundError):
        importing(tmp_path / "nowhere")


def test_options_are_checked(importing):
    path = FOLDER / "vllm/responses.jsonl"
    for options, message in (
        ({"num_experts": 0}, "num_experts must be"),
        ({"top_k": 10**6}, "top_k must be"),
        ({"layers": (3, 1)}, "increasing"),
        ({"layers": ()}, "increasing"),
        ({"layers": (1, 9)}, "layer 9 of `layers` is beyond"),
        ({"num_experts": 8}, "outside 0..7"),
        ({"layers": (2,)}, "layer 1 routes tokens"),
    ):
        with pytest.raises(InvalidTraceError, match=message):
            importing(path, **options)


@pytest.mark.parametrize(
    ("file", "options", "flag"),
    [
        ("load.npy", {"num_layers": 3}, "`num_layers`"),
        ("load.npy", {"slot_experts": {}}, "`slot_experts`"),
        ("vllm/request0.npy", {"top_k": 4}, "`top_k`"),
        ("trtllm_counts", {"layers": (1, 2)}, "`layers`"),
    ],
)
def test_options_that_would_be_passed_over_are_refused(importing, file, options, flag):
    with pytest.raises(InvalidTraceError, match=f"{flag} means nothing"):
        importing(FOLDER / file, **options)


def test_more_experts_per_token_than_experts_are_refused(importing, tmp_path):
    np.save(tmp_path / "a.npy", np.ones((2, 4), np.int64))
    with pytest.raises(InvalidTraceError, match="`top_k` is 5"):
        importing(tmp_path / "a.npy", top_k=5)


def test_a_folder_of_two_kinds_is_refused(tmp_path):
    (tmp_path / "meta_info.json").touch()
    (tmp_path / "router_trace_rank0.jsonl").touch()
    with pytest.raises(InvalidTraceError, match="trtllm and megatron in one folder"):
        detect_format(tmp_path)


def test_tokens_without_any_expert_are_padding(importing, tmp_path):
    rows = [[0, 1], [-1, -1], [2, -1]]
    path = megatron(tmp_path / "a.jsonl", {"top_indices": rows})
    assert importing(path).topk_ids.tolist() == [[[0, 1]], [[2, -1]]]
    ids = np.array(rows, np.int32)
    folder = statistics(tmp_path / "s", {"1_3": ids}, name="rank0_raw.safetensors")
    assert importing(folder).topk_ids.tolist() == [[[0, 1]], [[2, -1]]]


def test_counts_are_a_trace_file_of_their_own(importing, tmp_path):
    trace = importing(FOLDER / "trtllm_counts", model="m", dataset="d")
    write_trace(trace, tmp_path / "again.safetensors")
    again = read_trace(tmp_path / "again.safetensors")
    assert again.sha256() == trace.sha256()
    assert again.metadata == trace.metadata
    assert again.num_tokens.tolist() == trace.num_tokens.tolist()
    tensors = load_file(tmp_path / "again.safetensors")
    assert tensors["counts"].dtype == np.int64
