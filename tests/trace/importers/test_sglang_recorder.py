"""Dumps of SGLang's recorder made by hand, for what its own do not show."""

import numpy as np
import pytest
from moetuner.errors import InvalidTraceError

torch = pytest.importorskip("torch")

MAP = [[1, 0, 3, 2, 1, 3], [0, 1, 2, 3, 0, 1]]  # six slots for four experts


def record(number, rank, ids_LTK=None, counts=None, **fields):
    """A record of a decoding pass, unless told otherwise."""
    fields = {"forward_mode": 2, "extend_seq_lens": None} | fields
    if ids_LTK is not None:
        fields["topk_ids_of_layer"] = torch.tensor(ids_LTK, dtype=torch.int32)
        fields.setdefault("input_ids", list(range(len(ids_LTK[0]))))
        fields.setdefault("positions", list(range(len(ids_LTK[0]))))
    if counts is not None:
        fields["global_physical_count"] = torch.tensor(counts, dtype=torch.int32)
    return {
        "forward_pass_id": number,
        "rank": rank,
        "gatherer_key": "primary",
        **fields,
    }


def dump(path, *records, map=MAP):
    torch.save(
        {"records": list(records), "last_physical_to_logical_map": torch.tensor(map)},
        path,
    )
    return path


def test_slots_become_experts_layer_by_layer(importing, tmp_path):
    ids = [[[4, 2, -1], [0, 5, -1]], [[4, 2, -1], [-1, -1, -1]]]
    trace = importing(dump(tmp_path / "a.pt", record(3, 0, ids)))
    assert trace.topk_ids.tolist() == [[[1, 3], [0, 2]], [[1, 3], [-1, -1]]]
    assert trace.num_experts == 4
    assert trace.home_rank is None  # one rank alone says nothing


def test_tokens_without_any_expert_are_padding(importing, tmp_path):
    ids = [[[-1, -1], [0, 1]], [[-1, -1], [2, 3]]]
    trace = importing(dump(tmp_path / "a.pt", record(3, 0, ids)))
    assert trace.num_tokens == 1
    assert trace.position.tolist() == [1]


def test_the_same_tokens_on_all_ranks_count_once(importing, tmp_path):
    """Without data-parallel attention every rank sees and records every token."""
    ids = [[[0, 1]], [[2, 3]]]
    files = [dump(tmp_path / f"{r}.pt", record(5, r, ids)) for r in range(3)]
    other = record(6, 0, [[[4, 2]], [[1, 3]]], input_ids=[9])
    files.append(dump(tmp_path / "other.pt", other))
    trace = importing(*files)
    assert trace.num_tokens == 2
    assert trace.home_rank is None
    assert sum("count once" in note for note in importing.notes) == 1


def test_ranks_without_tokens_are_no_repeats(importing, tmp_path):
    empty = {"topk_ids_of_layer": torch.empty(2, 0, 2, dtype=torch.int32)}
    files = [
        dump(
            tmp_path / f"{rank}.pt",
            record(1, rank, [[[0, 1]], [[2, 3]]], input_ids=[rank]),
            record(2, rank, **empty),
        )
        for rank in range(2)
    ]
    assert importing(*files).home_rank.tolist() == [0, 1]


def test_dumps_with_different_maps_say_so(importing, tmp_path):
    one = dump(tmp_path / "a.pt", record(1, 0, [[[0, 1]], [[2, 3]]]))
    two = dump(tmp_path / "b.pt", record(2, 0, [[[0, 1]], [[2, 3]]]), map=MAP[::-1])
    importing(one, two)
    assert any("experts moved" in note for note in importing.notes)


def test_idle_ranks_and_empty_passes_are_nothing(importing, tmp_path):
    empty = {"topk_ids_of_layer": torch.empty(2, 0, 2, dtype=torch.int32)}
    records = [
        record(1, 0, forward_mode=4, **empty),
        record(2, 0, **empty),
        record(3, 0, [[[0, 1]], [[2, 3]]]),
    ]
    assert importing(dump(tmp_path / "a.pt", *records)).num_tokens == 1


def test_layers_without_experts_are_dense(importing, tmp_path):
    ids = [[[-1, -1]], [[0, 1]]]
    path = dump(tmp_path / "a.pt", record(1, 0, ids))
    assert importing(path).layer_ids.tolist() == [1]
    assert "layer 0 holds no routing" in importing.notes[0]
    later = record(2, 0, [[[0, 1]], [[0, 1]]])
    with pytest.raises(InvalidTraceError, match=r"layer 0 routes.*`layers`"):
        importing(dump(tmp_path / "b.pt", record(1, 0, ids), later))
    assert importing(tmp_path / "b.pt", layers=(0, 1)).num_tokens == 2


def test_dumps_of_a_gpu_server_are_read_without_a_gpu(importing, tmp_path, monkeypatch):
    """The last map lies on the GPU when it is saved; its pickle says ``cuda:0``."""
    monkeypatch.setattr(torch.serialization, "location_tag", lambda _: "cuda:0")
    path = dump(tmp_path / "a.pt", record(1, 0, [[[0, 1]], [[2, 3]]]))
    assert b"cuda:0" in path.read_bytes()
    assert importing(path).num_tokens == 1


def test_counts_of_ranks_are_added(importing, tmp_path):
    counts = [[1, 2, 3, 4, 5, 6], [6, 5, 4, 3, 2, 1]]
    files = [
        dump(tmp_path / f"{rank}.pt", *(record(n, rank, counts=counts) for n in (7, 8)))
        for rank in (0, 1)
    ]
    trace = importing(*files)
    one = [[2, 1 + 5, 4, 3 + 6], [6 + 2, 5 + 1, 4, 3]]
    assert trace.counts.tolist() == [(2 * np.array(one)).tolist()] * 2


def test_many_passes_are_folded_in_order(importing, tmp_path):
    steps = torch.arange(1, 201, dtype=torch.int32)[:, None, None].expand(-1, 2, 4)
    path = tmp_path / "stat.pt"
    torch.save({"rank": 0, "logical_count": steps.contiguous()}, path)
    trace = importing(path)
    assert trace.num_groups == 64
    assert trace.counts.sum() == 8 * 200 * 201 // 2
    assert (np.diff(trace.counts[:, 0, 0]) != 0).any()
    assert trace.counts[0, 0, 0] < trace.counts[-1, 0, 0]


def test_unused_steps_of_the_buffer_are_no_groups(importing, tmp_path):
    steps = torch.zeros(10, 2, 4, dtype=torch.int32)
    steps[3] = 5
    torch.save({"logical_count": steps}, tmp_path / "stat.pt")
    assert importing(tmp_path / "stat.pt").counts.tolist() == [[[5] * 4] * 2]


@pytest.mark.parametrize(
    ("ids", "fields", "message"),
    [
        ([[[0, 6]], [[2, 3]]], {}, "outside 0..5.*fused"),
        ([[[0, -2]], [[2, 3]]], {}, "outside 0..5"),
        ([[[0, 4]], [[0, 4]]], {}, "twice"),  # one expert in two slots
        ([[[0, 1]]], {}, "1 layer beside a map of 2"),
        ([[[0, 1]], [[2, 3]]], {"positions": [1, 2, 3]}, "3 positions for 1 token"),
        ([[[0, 1]], [[2, 3]]], {"positions": [2**40]}, "positions must be"),
        ([[[0, 1]], [[2, 3]]], {"input_ids": [[1], [2, 3]]}, "input_ids must be"),
        ([[[0, 1]], [[2, 3]]], {"input_ids": ["x"]}, "input_ids must be"),
        ([[[0, 1]], [[2, 3]]], {"forward_mode": "decode"}, "forward_mode must be"),
        ([[[0, 1]], [[2, 3]]], {"forward_pass_id": -1}, "forward_pass_id must be"),
        ([[[0, 1]], [[2, 3]]], {"rank": 10**9}, "rank must be"),
    ],
)
def test_damaged_records_are_refused(importing, tmp_path, ids, fields, message):
    one = record(1, 0, ids) | fields
    with pytest.raises(InvalidTraceError, match=message):
        importing(dump(tmp_path / "a.pt", one))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"records": 5, "last_physical_to_logical_map": torch.zeros(2, 2)}, "integers"),
        ({"records": [], "last_physical_to_logical_map": None}, "must be a tensor"),
        ({"records": 5, "last_physical_to_logical_map": torch.tensor(MAP)}, "a list"),
        ({"records": [7], "last_physical_to_logical_map": torch.tensor(MAP)}, "a dict"),
        (
            {"records": [], "last_physical_to_logical_map": torch.tensor(MAP)},
            "no token",
        ),
        ({"logical_count": torch.zeros(2)}, "3 dimensions"),
        ({"logical_count": torch.zeros(2, 3, 4)}, "counted nothing"),
        ({"logical_count": torch.full((2, 3, 4), float("nan"))}, "finite"),
        ({"logical_count": torch.full((2, 3, 4), -1)}, "must be 0"),
    ],
)
def test_damaged_dumps_are_refused(importing, tmp_path, content, message):
    torch.save(content, tmp_path / "a.pt")
    with pytest.raises(InvalidTraceError, match=message):
        importing(tmp_path / "a.pt", format="sglang-recorder")


def test_a_dump_given_twice_is_refused(importing, tmp_path):
    ids = [[[0, 1]], [[2, 3]]]
    files = [dump(tmp_path / f"{n}.pt", record(1, 0, ids)) for n in "ab"]
    with pytest.raises(InvalidTraceError, match="there twice"):
        importing(*files)
    with pytest.raises(InvalidTraceError, match="given twice"):
        importing(files[0], files[0])


def test_empty_passes_of_a_draft_model_are_dropped(importing, tmp_path):
    """With speculative decoding target and draft number passes each for itself."""
    nothing = [[[-1, -1]], [[-1, -1]]]
    files = [
        record(7, 0, [[[0, 1]], [[2, 3]]], counts=[[1] * 6] * 2),
        record(7, 0, nothing, counts=[[0] * 6] * 2, input_ids=[9]),
        record(8, 0, nothing, counts=[[0] * 6] * 2),
        record(8, 0, [[[4, 2]], [[1, 3]]], counts=[[2] * 6] * 2),
    ]
    trace = importing(dump(tmp_path / "a.pt", *files))
    assert trace.topk_ids.tolist() == [[[1, 0], [2, 3]], [[1, 3], [1, 3]]]
    for one in files:
        del one["topk_ids_of_layer"]
    trace = importing(dump(tmp_path / "a.pt", *files))
    assert trace.num_groups == 2
    assert trace.counts.sum() == 6 * 2 * (1 + 2)


@pytest.mark.parametrize("counted", [True, False])
def test_stages_of_a_pipeline_are_joined(importing, tmp_path, counted):
    """The same pass of the same rank at other layers."""
    ids = [[[0, 1], [4, 2]], [[2, 3], [1, 3]]]
    counts = [[1, 1, 1, 0, 1, 0], [0, 1, 1, 2, 0, 0]]
    none = [[-1, -1]] * 2
    stages = []
    for stage in range(2):
        mine = [row if n == stage else none for n, row in enumerate(ids)]
        of = [row if n == stage else [0] * 6 for n, row in enumerate(counts)]
        fields = {"counts": of} if counted else {}
        stages.append(dump(tmp_path / f"{stage}.pt", record(5, 0, mine, **fields)))
    trace = importing(*stages)
    whole = importing(dump(tmp_path / "whole.pt", record(5, 0, ids)))
    assert np.array_equal(trace.topk_ids, whole.topk_ids)
    assert trace.home_rank is None
    longer = record(5, 0, [[[0, 1]] * 3, [none[0]] * 3], counts=[counts[0], [0] * 6])
    with pytest.raises(InvalidTraceError, match="there twice"):
        importing(dump(tmp_path / "x.pt", longer), stages[1])


def test_counts_of_stages_are_joined(importing, tmp_path):
    counts = [[1, 2, 3, 4, 5, 6], [6, 5, 4, 3, 2, 1]]
    files = [
        dump(
            tmp_path / f"{stage}.pt",
            record(
                7,
                0,
                counts=[c if n == stage else [0] * 6 for n, c in enumerate(counts)],
            ),
        )
        for stage in range(2)
    ]
    whole = importing(dump(tmp_path / "whole.pt", record(7, 0, counts=counts)))
    assert importing(*files).counts.tolist() == whole.counts.tolist()


def test_expert_0_alone_is_a_choice_where_padding_is_marked(importing, tmp_path):
    """The recorder writes -1 itself, so zeros of one expert per token are real."""
    ids = [[[0, -1], [2, -1]], [[0, -1], [3, -1]]]
    trace = importing(dump(tmp_path / "a.pt", record(1, 0, ids)))
    assert trace.num_tokens == 2
    plain = [[0, 1, 2, 3]] * 2
    trace = importing(dump(tmp_path / "b.pt", record(1, 0, ids), map=plain))
    assert trace.topk_ids.tolist() == [[[0], [0]], [[2], [3]]]


def test_more_experts_than_the_recorder_keeps_are_told(importing, tmp_path):
    path = dump(tmp_path / "a.pt", record(1, 0, [[[0, 1]], [[2, 3]]]))
    with pytest.raises(InvalidTraceError, match="recorder kept 2 experts"):
        importing(path, top_k=3)
    counts = [[1, 1, 1, 0, 0, 0], [0, 0, 1, 1, 1, 0]]
    importing(dump(tmp_path / "a.pt", record(1, 0, [[[0, 1]], [[2, 3]]], counts)))
    assert any("more than the 2 experts" in note for note in importing.notes)


def test_the_map_says_how_many_experts_there_are(importing, tmp_path):
    path = dump(tmp_path / "a.pt", record(1, 0, [[[0, 1]], [[2, 3]]]))
    assert importing(path, num_experts=4).num_experts == 4
    with pytest.raises(InvalidTraceError, match="map of slots is of 4"):
        importing(path, num_experts=8)


def test_halves_of_a_batch_are_no_duplicates(importing, tmp_path):
    """With two-batch overlap each half of a pass is gathered for itself."""
    halves = [
        record(1, 0, [[[0, 1]], [[2, 3]]]),
        record(1, 0, [[[4, 2]], [[1, 3]]], input_ids=[9]),
        record(1, 0, [[[-1, -1]], [[-1, -1]]]),
    ]
    halves[0]["gatherer_key"], halves[1]["gatherer_key"] = "child_a", "child_b"
    assert importing(dump(tmp_path / "a.pt", *halves)).num_tokens == 2


def test_stages_that_are_ranks_of_their_own_are_joined(importing, tmp_path):
    """Two pipelines of two stages: ranks 0 and 2, ranks 1 and 3."""
    none = [[-1, -1]]
    tokens = {0: [[0, 1]], 1: [[4, 2]]}
    files = [
        dump(
            tmp_path / f"{rank}.pt",
            record(
                5,
                rank,
                [tokens[rank % 2], none] if rank < 2 else [none, [[2, 3]]],
                input_ids=[rank % 2],
            ),
        )
        for rank in range(4)
    ]
    trace = importing(*files)
    assert trace.num_tokens == 2
    assert trace.home_rank.tolist() == [0, 1]
    assert (trace.topk_ids >= 0).all()
