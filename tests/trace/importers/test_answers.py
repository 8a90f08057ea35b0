"""Answers of servers: every form of their rows, prompts once, checked against usage."""

import base64
import io
import json
import re

import numpy as np
import pytest
from moetuner.errors import InvalidTraceError
from moetuner.trace import split_by_sequence
from safetensors.numpy import save_file

LAYERS, K, EXPERTS = 3, 2, 8


def rows(rng, tokens):
    """Rows of a dense layer and two MoE layers."""
    ids = np.argsort(rng.random((tokens, LAYERS, EXPERTS)))[..., :K]
    ids[:, 0] = 0
    return ids.astype(np.uint8)


def b64(data):
    return base64.b64encode(data).decode()


def npy(ids):
    stream = io.BytesIO()
    np.save(stream, ids)
    return b64(stream.getvalue())


def packed(ids, **fields):
    """The object of raw bytes."""
    return {"data": b64(ids.tobytes()), "shape": list(ids.shape)} | fields


FORMS = {
    "npy": npy,
    "lists": lambda ids: ids.tolist(),
    "object": lambda ids: packed(ids, dtype="uint8"),
    "object, torch": lambda ids: packed(ids.astype(np.int16), dtype="torch.int16"),
    "object, no dtype": lambda ids: packed(ids.astype(np.int32)),
    "object of lists": lambda ids: {"data": ids.tolist()},
    "flat": lambda ids: b64(ids.astype("<i4").tobytes()),
}
PLACES = {
    "choice": lambda rows: {"choices": [{"routed_experts": rows}]},
    "choice.sgl_ext": lambda rows: {"choices": [{"sgl_ext": {"routed_experts": rows}}]},
    "choice.sglext": lambda rows: {"choices": [{"sglext": {"routed_experts": rows}}]},
    "sgl_ext": lambda rows: {"sgl_ext": {"routed_experts": rows}},
    "meta_info": lambda rows: {"meta_info": {"routed_experts": rows}},
    "top": lambda rows: {"routed_experts": rows},
}


def write(path, *lines, indent=None):
    text = (json.dumps(line, indent=indent) for line in lines)
    path.write_text("".join(line + "\n" for line in text))
    return path


def usage(prompt, completion):
    return {"usage": {"prompt_tokens": prompt, "completion_tokens": completion}}


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("form", FORMS)
def test_every_form_at_every_place(importing, tmp_path, rng, form, place):
    ids = rows(rng, 9)
    options = {"num_layers": LAYERS, "top_k": K} if form == "flat" else {}
    line = PLACES[place](FORMS[form](ids)) | usage(5, 5)
    trace = importing(write(tmp_path / "a.jsonl", line), num_experts=8, **options)
    assert trace.layer_ids.tolist() == [1, 2]
    assert np.array_equal(trace.topk_ids, ids[:, 1:])
    assert trace.phase.tolist() == [0] * 5 + [1] * 4
    assert trace.request is None


@pytest.mark.parametrize("form", ["npy", "lists", "object"])
def test_rows_of_the_prompt_are_joined(importing, tmp_path, rng, form):
    ids = [rows(rng, 9) for _ in range(4)]
    lines = [
        {
            "prompt_routed_experts": FORMS[form](one[:5]),
            "choices": [{"routed_experts": FORMS[form](one[5:])}],
            **usage(5, 5),
        }
        for one in ids
    ]
    trace = importing(write(tmp_path / "a.jsonl", *lines), num_experts=8)
    assert np.array_equal(trace.topk_ids, np.concatenate(ids)[:, 1:])
    assert trace.position.tolist() == list(range(9)) * 4
    assert trace.phase.tolist() == ([0] * 5 + [1] * 4) * 4
    assert trace.num_sequences == 4


def test_choices_that_hold_the_prompt_once_more(importing, tmp_path, rng):
    ids = rows(rng, 9)
    line = {
        "prompt_routed_experts": npy(ids[:5]),
        "choices": [{"routed_experts": npy(ids)}],
    }
    for told in ({}, usage(5, 5)):
        path = write(tmp_path / "a.jsonl", line | told)
        assert np.array_equal(importing(path, num_experts=8).topk_ids, ids[:, 1:])


@pytest.mark.parametrize("told", [True, False])
@pytest.mark.parametrize("apart", [True, False])
def test_several_answers_share_one_prompt(importing, tmp_path, rng, told, apart):
    """Prompt once, a sequence for each answer, all of them on one side of a split."""
    lines, wanted = [], []
    for _ in range(6):
        prompt = rows(rng, 5)
        answers = [rows(rng, 3 + n) for n in range(3)]
        whole = [np.concatenate([prompt, answer]) for answer in answers]
        line = {
            "choices": [
                {"index": n, "routed_experts": npy(answers[n] if apart else whole[n])}
                for n in range(3)
            ]
        }
        if apart:
            line["prompt_routed_experts"] = npy(prompt)
        if told:
            line |= usage(5, sum(len(a) + 1 for a in answers))
        lines.append(line)
        wanted += [prompt, *answers]
    trace = importing(write(tmp_path / "a.jsonl", *lines), num_experts=8)
    assert np.array_equal(trace.topk_ids, np.concatenate(wanted)[:, 1:])
    assert trace.num_sequences == 18
    assert trace.request.tolist() == np.repeat(range(6), 5 + 3 + 4 + 5).tolist()
    first = trace.position[: 5 + 3 + 4 + 5].tolist()
    assert first == [*range(8), *range(5, 9), *range(5, 10)]
    assert trace.phase[:17].tolist() == [0] * 5 + [1] * 12
    split = split_by_sequence(trace)
    assert not set(split.plan.request) & set(split.score.request)


def test_a_list_of_answers_to_one_prompt_is_one_request(importing, tmp_path, rng):
    """As SGLang returns them; another prompt in the list is another request."""
    prompt, other = rows(rng, 4), rows(rng, 4)

    def answer(head, tail):
        ids = np.concatenate([head, tail])
        info = {"prompt_tokens": 4, "completion_tokens": len(tail) + 1}
        return {"meta_info": {"routed_experts": npy(ids)} | info}

    tails = [rows(rng, 2) for _ in range(3)]
    line = [answer(prompt, tails[0]), answer(prompt, tails[1]), answer(other, tails[2])]
    trace = importing(write(tmp_path / "a.jsonl", line), num_experts=8)
    assert trace.num_tokens == 4 + 2 + 2 + 4 + 2
    assert trace.request.tolist() == [0] * 8 + [1] * 6
    assert trace.num_sequences == 3


def test_one_response_over_several_lines(importing, tmp_path, rng):
    ids = rows(rng, 9)
    line = {"choices": [{"routed_experts": npy(ids)}]} | usage(5, 5)
    path = write(tmp_path / "a.json", line, line, indent=2)
    assert importing(path, num_experts=8).num_tokens == 18
    other = {"choices": [{"routed_experts": npy(rows(rng, 9))}]} | usage(5, 5)
    path.write_text(json.dumps([line, other], indent=1))
    assert importing(path, num_experts=8).num_tokens == 18


@pytest.mark.parametrize("start", [None, 3])
def test_fewer_rows_are_the_last_ones(importing, tmp_path, rng, start):
    """Of a request that asked for no more; positions and phase stay right."""
    ids = rows(rng, 6)
    fields = {"dtype": "uint8"} | ({} if start is None else {"start": start})
    line = {"choices": [{"routed_experts": packed(ids, **fields)}]} | usage(5, 5)
    trace = importing(write(tmp_path / "a.jsonl", line), num_experts=8)
    assert trace.position.tolist() == [3, 4, 5, 6, 7, 8]
    assert trace.phase.tolist() == [0, 0, 1, 1, 1, 1]
    said = "1 request has 3 rows fewer than usage"
    noted = any(said in note for note in importing.notes)
    assert noted == (start is None)


def test_a_prompt_that_is_not_whole(importing, tmp_path, rng):
    prompt, answer = rows(rng, 3), rows(rng, 4)
    line = {
        "prompt_routed_experts": npy(prompt),
        "choices": [{"routed_experts": npy(answer)}],
        **usage(5, 5),
    }
    trace = importing(write(tmp_path / "a.jsonl", line), num_experts=8)
    assert trace.position.tolist() == [2, 3, 4, 5, 6, 7, 8]
    assert any("2 rows fewer" in note for note in importing.notes)


def test_more_rows_than_usage_counts_are_refused(importing, tmp_path, rng):
    line = {"choices": [{"routed_experts": npy(rows(rng, 20))}]} | usage(5, 5)
    said = r"20 rows .* counts 5 tokens of the prompt and 5 of 1 answer: wanted 9 rows"
    with pytest.raises(InvalidTraceError, match=said):
        importing(write(tmp_path / "a.jsonl", line), num_experts=8)
    line = {"prompt_routed_experts": npy(rows(rng, 6)), "choices": []} | usage(5, 5)
    with pytest.raises(InvalidTraceError, match="6 rows of a prompt of 5 tokens"):
        importing(write(tmp_path / "a.jsonl", line), num_experts=8)


def test_aborted_answers_are_left_out(importing, tmp_path, rng):
    good = {"choices": [{"routed_experts": npy(rows(rng, 9))}]} | usage(5, 5)
    none = {"prompt_routed_experts": None, "choices": [{"routed_experts": None}]}
    trace = importing(write(tmp_path / "a.jsonl", none, good), num_experts=8)
    assert trace.num_tokens == 9
    assert "1 response without routed experts: left out" in importing.notes


def test_rows_that_nobody_wrote_are_counted(importing, tmp_path, rng):
    """One expert per token too: a decoding server hands out zeros for the prompt."""
    ids = np.zeros((9, 4, 1), np.uint8)
    ids[5:, 1::2, 0] = rng.integers(1, 8, (4, 2))
    line = {"choices": [{"routed_experts": npy(ids)}]} | usage(5, 5)
    trace = importing(write(tmp_path / "a.jsonl", line), num_experts=8)
    assert trace.layer_ids.tolist() == [1, 3]
    assert trace.num_tokens == 4
    assert trace.phase.tolist() == [1] * 4
    assert any("5 rows that nobody wrote" in note for note in importing.notes)


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ([[1, 2]], r"\[tokens\]\[layers\]\[top-k\]"),
        ([[[1, 2], [3]]], "rows differ in length"),
        ([[[0.5, 2]]], "whole numbers"),
        ({"data": 5, "shape": [1, 1, 1]}, "data must be base64"),
        ({"data": "AAAA", "shape": [1, 1]}, "shape must be"),
        ({"data": "AAAA", "shape": [2, 1, 1]}, "holds 3 bytes, shape wants 2"),
        ({"data": "AAAA", "shape": [3, 1, 1], "dtype": "float16"}, "holds no ids"),
        ({"data": "AAAA", "shape": [1, 1, 2], "dtype": "int16"}, "are no int16"),
        ({"data": "AAAA", "shape": [3, 1, 1], "start": -1}, "start must be a position"),
        ({"data": "%", "shape": [1, 1, 1]}, "not base64"),
        ({"data": [[[1], [1, 2]]], "shape": [1, 2, 1]}, "data"),
        (True, "base64 text, lists"),
    ],
)
def test_hostile_rows(importing, tmp_path, value, message):
    line = {"choices": [{"routed_experts": value}]}
    with pytest.raises(InvalidTraceError, match=message):
        importing(write(tmp_path / "a.jsonl", line), num_experts=8)


def test_rows_of_moe_layers_only_are_named_in_order(importing, tmp_path, rng):
    ids = rows(rng, 9)[:, 1:]
    np.save(tmp_path / "a.npy", ids)
    trace = importing(tmp_path / "a.npy", layers=(3, 6), num_experts=8)
    assert trace.layer_ids.tolist() == [3, 6]
    assert np.array_equal(trace.topk_ids, ids)
    np.save(tmp_path / "b.npy", rows(rng, 9))  # a dense one among three rows
    assert importing(
        tmp_path / "b.npy", layers=(4, 5), num_experts=8
    ).layer_ids.tolist() == [4, 5]
    with pytest.raises(InvalidTraceError, match="name neither"):
        importing(tmp_path / "b.npy", layers=(4, 5, 6, 7), num_experts=8)


def test_arrays_of_torch_and_of_one_layer(importing, tmp_path, rng):
    torch = pytest.importorskip("torch")
    ids = rows(rng, 9)[:, 1:].astype(int)
    torch.save({"a": torch.tensor(ids), "n": 5}, tmp_path / "a.pt")
    trace = importing(tmp_path / "a.pt", format="routed-arrays", num_experts=8)
    assert np.array_equal(trace.topk_ids, ids)
    np.save(tmp_path / "one.npy", ids[:, 0])
    trace = importing(tmp_path / "one.npy", format="routed-arrays", num_experts=8)
    assert np.array_equal(trace.topk_ids[:, 0], ids[:, 0])


def test_vllms_own_output_objects(importing, tmp_path, rng):
    """``RequestOutput`` as JSON: outputs instead of choices, ids instead of usage."""
    ids = rows(rng, 9)
    line = {
        "prompt_token_ids": list(range(5)),
        "prompt_routed_experts": ids[:5].tolist(),
        "outputs": [{"index": 0, "routed_experts": ids[5:].tolist()}],
    }
    trace = importing(write(tmp_path / "a.jsonl", line), num_experts=8)
    assert np.array_equal(trace.topk_ids, ids[:, 1:])
    assert trace.phase.tolist() == [0] * 5 + [1] * 4


@pytest.mark.parametrize("kind", ["npz", "safetensors", "json"])
def test_arrays_in_other_files(importing, tmp_path, rng, kind):
    ids = np.ascontiguousarray(rows(rng, 9)[:, 1:])
    path = tmp_path / f"a.{kind}"
    if kind == "npz":
        np.savez(path, routed_experts=ids)
    elif kind == "safetensors":
        save_file({"topk_ids": ids}, path)  # not a trace of ours
    else:
        path.write_text(json.dumps(ids.tolist()))
    trace = importing(path, format="routed-arrays", num_experts=8)
    assert np.array_equal(trace.topk_ids, ids)
    if kind == "json":
        with pytest.raises(InvalidTraceError, match="`format` routed-arrays"):
            importing(path)


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ({"top_k": 3}, "`top_k` is 3, the recording has 2 experts per token"),
        ({"num_layers": 2}, "`num_layers` is 2, the recording has 3 layers"),
    ],
)
def test_options_that_contradict_nested_rows_are_refused(
    importing, tmp_path, option, message
):
    line = {"choices": [{"routed_experts": [[[1, 2], [3, 4], [5, 6]]]}]}
    with pytest.raises(InvalidTraceError, match=re.escape(message)):
        importing(write(tmp_path / "a.jsonl", line), **option)


def test_rows_of_different_length_are_told_without_numpy_s_words(importing, tmp_path):
    line = {"choices": [{"routed_experts": [[[1, 2], [3]]]}]}
    with pytest.raises(InvalidTraceError, match="rows differ in length") as raised:
        importing(write(tmp_path / "a.jsonl", line))
    assert "inhomogeneous" not in str(raised.value)


@pytest.mark.parametrize(
    ("start", "message"),
    [
        (b"\xef\xbb\xbf{}", "JSON behind a byte order mark"),
        ("{}".encode("utf-16"), "text in UTF-16"),
        (b"\x1f\x8b\x08", "a compressed file: unpack it first"),
        (b"\x28\xb5\x2f\xfd", "a compressed file: unpack it first"),
    ],
)
def test_files_that_are_easily_made_right_say_how(importing, tmp_path, start, message):
    path = tmp_path / "a.jsonl"
    path.write_bytes(start)
    with pytest.raises(InvalidTraceError, match=message):
        importing(path)


def test_an_error_of_a_block_names_the_file(importing, tmp_path):
    path = tmp_path / "a.csv"
    path.write_text("token,expert\n0,3\n0,3\n")
    with pytest.raises(
        InvalidTraceError, match=r"a\.csv: Trace: token 0 lists expert 3"
    ):
        importing(path)
