"""TensorRT-LLM, Megatron, EPLB and NumPy files beyond what their own code wrote."""

import json
import shutil

import numpy as np
import pytest
from engine_files import FOLDER
from moetuner.errors import InvalidTraceError
from moetuner.trace import CountTrace, read_trace, write_trace
from moetuner.trace.importers import detect_format, npz_file
from safetensors.numpy import load_file, save_file
from strategies import make_trace, random_ids


def statistics(folder, tensors, meta=None, name="rank0.safetensors"):
    folder.mkdir(exist_ok=True)
    meta = meta or {"num_experts": 4, "num_experts_per_token": 2}
    (folder / "meta_info.json").write_text(json.dumps(meta))
    save_file(tensors, folder / name)
    return folder


COUNTS = np.array([1, 2, 3, 4], np.int64)


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


def megatron(path, *records):
    base = {"step": 0, "block": "decoder", "layer": 0, "rank": 0}
    lines = [json.dumps(base | record) for record in records]
    path.write_text("\n".join(lines) + "\n")
    return path


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


def test_counts_of_archives_are_of_as_many_experts_as_told(importing, tmp_path):
    np.savez(tmp_path / "a.npz", counts=np.ones((1, 2, 4), np.int64))
    with pytest.raises(InvalidTraceError, match="`num_experts` is 8"):
        importing(tmp_path / "a.npz", num_experts=8)


def test_tokens_without_any_expert_are_padding(importing, tmp_path):
    rows = [[0, 1], [-1, -1], [2, -1]]
    path = megatron(tmp_path / "a.jsonl", {"top_indices": rows})
    assert importing(path).topk_ids.tolist() == [[[0, 1]], [[2, -1]]]
    ids = np.array(rows, np.int32)
    folder = statistics(tmp_path / "s", {"1_3": ids}, name="rank0_raw.safetensors")
    assert importing(folder).topk_ids.tolist() == [[[0, 1]], [[2, -1]]]


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


def test_counts_are_a_trace_file_of_their_own(importing, tmp_path):
    trace = importing(FOLDER / "trtllm_counts", model="m", dataset="d")
    write_trace(trace, tmp_path / "again.safetensors")
    again = read_trace(tmp_path / "again.safetensors")
    assert again.sha256() == trace.sha256()
    assert again.metadata == trace.metadata
    assert again.num_tokens.tolist() == trace.num_tokens.tolist()
    tensors = load_file(tmp_path / "again.safetensors")
    assert tensors["counts"].dtype == np.int64


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
