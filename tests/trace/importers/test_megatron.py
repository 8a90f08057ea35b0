"""Megatron's files beyond what its own code wrote."""

import pytest
from moetuner.errors import InvalidTraceError
from recordings import megatron


def test_megatron_tensor_parallel_ranks_count_once(importing, tmp_path):
    files = [
        megatron(
            tmp_path / f"router_trace_rank{rank}.jsonl",
            {"rank": rank, "top_indices": [[0, 1], [2, 3]]},
            {"rank": rank, "top_indices": [[4, 1], [2, 0]], "step": 1},
        )
        for rank in range(2)
    ]
    trace = importing(*files)
    assert trace.num_tokens == 4
    assert trace.home_rank is None
    assert trace.sequence.tolist() == [0, 0, 1, 1]


@pytest.mark.parametrize(
    ("records", "message"),
    [
        ([{"top_indices": [[0, 1], [2]]}], "rows differ"),
        ([{"top_indices": [[0, 1]], "num_tokens": 2}], "must be .num_tokens, topk."),
        ([{"top_indices": "x"}], "top_indices must be"),
        ([{"top_indices": [[0.5, 1]]}], "must be integers"),
        ([{"top_indices": [[0, 2**80]]}], "expert ids must be integers"),
        ([{"top_indices": [[1, 1]]}], "twice"),
        ([{"top_indices": [[0, 40000]]}], "expert ids must be"),
        ([{"top_indices": [[0, 1]], "layer": -1}], "layer must be"),
        ([{"top_indices": [[0, 1]]}, {"top_indices": [[0, 1]], "layer": 1, "step": 1}],
         "without pipeline parallelism"),
        ([{"top_indices": [[0, 1]], "step": 1}, {"top_indices": [[0, 1]]}],
         "after step"),
        ([{"top_indices": [[0, 1]]}, {"top_indices": [[0, 1], [1, 0]], "layer": 1}],
         "differ in tokens"),
        ([{"top_indices": [[0, 1]]}] * 2 + [{"top_indices": [[0, 1]], "layer": 1}],
         "wanted each as often"),
        ([{"top_indices": [[0, 1]], "block": "mtp"}], "no record of a decoder layer"),
    ],
)  # fmt: skip
def test_megatron_records_are_checked(importing, tmp_path, records, message):
    path = megatron(tmp_path / "router_trace_rank0.jsonl", *records)
    with pytest.raises(InvalidTraceError, match=message):
        importing(path)


def test_megatron_ranks_without_tokens_are_no_repeats(importing, tmp_path):
    files = [
        megatron(
            tmp_path / f"router_trace_rank{rank}.jsonl",
            {"rank": rank, "top_indices": [[rank, 2]], "topk": 2},
            {"rank": rank, "top_indices": [], "topk": 2, "step": 1},
        )
        for rank in range(2)
    ]
    assert importing(*files).home_rank.tolist() == [0, 1]


def test_megatron_stages_of_a_pipeline_are_joined(importing, tmp_path):
    files = [
        megatron(
            tmp_path / f"router_trace_rank{rank}.jsonl",
            {"rank": rank, "layer": 3 + rank, "top_indices": [[rank, 2], [5, 3]]},
            {"rank": rank, "layer": 3 + rank, "top_indices": [[4, 2]], "step": 1},
        )
        for rank in range(2)
    ]
    trace = importing(*files)
    assert trace.layer_ids.tolist() == [3, 4]
    assert trace.topk_ids.tolist() == [
        [[0, 2], [1, 2]], [[5, 3], [5, 3]], [[4, 2], [4, 2]]
    ]  # fmt: skip
    assert trace.sequence.tolist() == [0, 0, 1]
