"""Tables with a route or a count a row, under the names that loggers give."""

import csv
import json

import numpy as np
import pytest
from moetuner.errors import InvalidTraceError, MissingDependencyError
from moetuner.trace import CountTrace
from moetuner.trace.importers import detect_format
from moetuner.trace.importers.columns import Column, columns_of

EXPERTS = 16


@pytest.fixture
def ids(rng):
    """Two requests of 5 and 7 tokens, layers 3, 4 and 6, ten experts per token."""
    return np.argsort(rng.random((12, 3, EXPERTS)))[..., :10].astype(int)


SEQUENCE = np.repeat([0, 1], [5, 7])
POSITION = np.concatenate([range(5), range(7)])
LAYERS = (3, 4, 6)


def routes(ids, **fields):
    """A row for each token and layer."""
    for token, of_token in enumerate(ids):
        for layer, experts in zip(LAYERS, of_token, strict=True):
            yield {
                "request_id": f"req-{SEQUENCE[token]}",
                "token_idx": int(POSITION[token]),
                "layer": layer,
                "topk_ids": experts.tolist(),
            }


def write(path, table, kind):
    table = list(table)
    if kind == "jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in table))
    elif kind == "csv":
        with path.open("w", newline="") as file:
            writer = csv.DictWriter(file, table[0].keys())
            writer.writeheader()
            writer.writerows(table)
    else:
        arrow = pytest.importorskip("pyarrow")
        from pyarrow import parquet

        parquet.write_table(arrow.Table.from_pylist(table), path)
    return path


KINDS = ["jsonl", "csv", "parquet"]


@pytest.mark.parametrize("kind", KINDS)
def test_a_list_of_experts_a_row(importing, tmp_path, ids, kind):
    path = write(tmp_path / "a", routes(ids), kind)
    assert detect_format(path).value == "table"
    trace = importing(path)
    assert np.array_equal(trace.topk_ids, ids)  # ten experts per token
    assert trace.layer_ids.tolist() == [3, 4, 6]
    assert trace.sequence.tolist() == SEQUENCE.tolist()
    assert trace.position.tolist() == POSITION.tolist()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    "name", ["model.layers.{}.mlp", "v2.layers.{}.mlp.experts.w13", "Layer {}", "L{}"]
)
def test_layers_by_the_names_of_modules(importing, tmp_path, ids, kind, name):
    table = [row | {"layer": name.format(row["layer"])} for row in routes(ids)]
    trace = importing(write(tmp_path / "a", table, kind))
    assert np.array_equal(trace.topk_ids, ids)
    assert trace.layer_ids.tolist() == [3, 4, 6]


@pytest.mark.parametrize(
    "name", ["mlp", "-3", "stage.1.block.2", "layers.3.layers.4", "layer 70000", ""]
)
def test_what_says_no_layer_is_refused(importing, tmp_path, ids, name):
    table = [row | {"layer": name} for row in routes(ids)]
    with pytest.raises(InvalidTraceError, match="layer"):
        importing(write(tmp_path / "a", table, "csv"))


@pytest.mark.parametrize("kind", KINDS)
def test_a_column_for_each_choice(importing, tmp_path, ids, kind):
    table = [
        {k: v for k, v in row.items() if k != "topk_ids"}
        | {f"Expert {n}": e for n, e in enumerate(row["topk_ids"], start=1)}
        for row in routes(ids)
    ]
    trace = importing(write(tmp_path / "a", table, kind))
    assert np.array_equal(trace.topk_ids, ids)


@pytest.mark.parametrize("kind", KINDS)
def test_a_row_for_each_choice(importing, tmp_path, ids, rng, kind):
    table = [
        {k: v for k, v in row.items() if k != "topk_ids"} | {"k": n, "expert_id": e}
        for row in routes(ids)
        for n, e in enumerate(row["topk_ids"])
    ]
    table = [table[n] for n in rng.permutation(len(table))]
    trace = importing(write(tmp_path / "a", table, kind), num_experts=EXPERTS)
    order = np.lexsort((trace.position, trace.sequence))
    by_request = [trace.topk_ids[trace.sequence == s] for s in (0, 1)]
    assert sorted(len(part) for part in by_request) == [5, 7]
    found = {tuple(row.ravel()) for row in trace.topk_ids[order]}
    assert found == {tuple(row.ravel()) for row in ids}


def test_weights_put_the_strongest_first(importing, tmp_path, ids, rng):
    weights = rng.random(ids.shape).astype(np.float32)
    table = list(routes(ids))
    for row, w in zip(table, weights.reshape(-1, 10), strict=True):
        row["topk_weights"] = w.tolist()
    trace = importing(write(tmp_path / "a", table, "jsonl"))
    order = np.argsort(-weights, axis=2, kind="stable")
    assert trace.ranked
    assert np.array_equal(trace.topk_ids, np.take_along_axis(ids, order, axis=2))
    np.testing.assert_array_equal(
        trace.topk_weights, np.take_along_axis(weights, order, axis=2)
    )


def test_a_log_with_a_header_line(importing, tmp_path, ids):
    """As loggers in vLLM write it: what the header says is taken from it."""
    meta = {"type": "meta", "num_experts": 60, "top_k": 10, "model_id": "m"}
    table = [meta, *({"type": "route"} | row for row in routes(ids))]
    trace = importing(write(tmp_path / "a", table, "jsonl"))
    assert trace.num_experts == 60
    assert np.array_equal(trace.topk_ids, ids)
    with pytest.raises(InvalidTraceError, match="the table says 60"):
        importing(tmp_path / "a", num_experts=64)


def test_passes_that_count_from_0_follow_one_another(importing, tmp_path, ids):
    """No request, no step: a token number that comes again is the next pass."""
    table = [
        {"layer": layer, "token_idx": token % 4, "topk_ids": ids[token, row].tolist()}
        for part in range(3)
        for row, layer in enumerate(LAYERS)
        for token in range(4 * part, 4 * part + 4)
    ]
    trace = importing(write(tmp_path / "a", table, "jsonl"))
    assert np.array_equal(trace.topk_ids, ids)
    assert trace.sequence.tolist() == np.repeat([0, 1, 2], 4).tolist()
    assert trace.position.tolist() == [0, 1, 2, 3] * 3


def test_a_file_for_each_layer(importing, tmp_path, ids):
    files = [
        write(
            tmp_path / f"{layer}",
            [row for row in routes(ids) if row["layer"] == layer],
            "csv",
        )
        for layer in LAYERS
    ]
    trace = importing(*files)
    assert np.array_equal(trace.topk_ids, ids)
    assert trace.sequence.tolist() == SEQUENCE.tolist()


def test_a_file_for_each_prompt_without_numbers(importing, tmp_path, ids):
    """Rows in order, a token's text beside them: the n-th row is the n-th token."""
    files = [
        write(
            tmp_path / f"{prompt}.csv",
            [
                {"Layer ID": layer, "Token": "text", "Activated Expert IDs": ids[t, r]}
                for r, layer in enumerate(LAYERS)
                for t in np.flatnonzero(prompt == SEQUENCE)
            ],
            "csv",
        )
        for prompt in (0, 1)
    ]
    trace = importing(*files)
    assert np.array_equal(trace.topk_ids, ids)
    assert trace.sequence.tolist() == SEQUENCE.tolist()


@pytest.mark.parametrize("named", [True, False])
def test_a_row_with_all_layers(importing, tmp_path, ids, named):
    def experts(token):
        rows = [row.tolist() for row in ids[token]]
        return dict(zip(map(str, LAYERS), rows, strict=True)) if named else rows

    table = [
        {"seq": int(SEQUENCE[t]), "pos": int(POSITION[t]), "experts": experts(t)}
        for t in range(12)
    ]
    path = write(tmp_path / "a", table, "jsonl")
    trace = importing(path, layers=None if named else LAYERS)
    assert np.array_equal(trace.topk_ids, ids)
    assert trace.layer_ids.tolist() == [0, 1, 2] if named else list(LAYERS)


def test_phases_and_ranks(importing, tmp_path, ids):
    table = [
        row | {"phase": "decode" if row["token_idx"] > 3 else "prefill", "rank": 2}
        for row in routes(ids)
    ]
    trace = importing(write(tmp_path / "a", table, "jsonl"))
    assert trace.phase.tolist() == (POSITION > 3).astype(int).tolist()
    assert set(trace.home_rank) == {2}


def test_routes_that_are_missing_are_padding(importing, tmp_path, ids):
    table = list(routes(ids))
    del table[4]
    trace = importing(write(tmp_path / "a", table, "jsonl"))
    assert (trace.topk_ids[1, 1] == -1).all()
    assert any("1 route of 12 tokens is missing" in note for note in importing.notes)


def counts(rng, path):
    table = rng.integers(1, 50, (3, EXPERTS))
    rows = [
        {"layer_id": layer, "expert_id": e, "count": int(table[row, e])}
        for row, layer in enumerate(LAYERS)
        for e in range(EXPERTS)
    ]
    write(path, rows, "csv")
    return table


def test_counts_of_sglangs_older_recorder(importing, tmp_path, rng):
    """One file for each rank, whose stamps differ a little; ranks are added up."""
    folder = tmp_path / "dumps"
    folder.mkdir()
    stamps = {(0, 0): "10.25", (1, 0): "10.5", (0, 1): "99.125", (1, 1): "99.5"}
    tables = {
        key: counts(rng, folder / f"expert_distribution_rank{key[0]}_timestamp{s}.csv")
        for key, s in stamps.items()
    }
    trace = importing(folder, top_k=4)
    assert isinstance(trace, CountTrace)
    assert trace.layer_ids.tolist() == [3, 4, 6]
    assert trace.counts.tolist() == [
        (tables[0, n] + tables[1, n]).tolist() for n in range(2)
    ]
    with pytest.raises(InvalidTraceError, match=r"outside 0\.\.7"):
        importing(folder, num_experts=8)


@pytest.mark.parametrize(
    ("header", "wanted"),
    [
        (["layer_id", "expert_id", "count"],
         {Column.LAYER, Column.EXPERT, Column.COUNT}),
        (["Layer", "Token Index", "Top-K IDs"],
         {Column.LAYER, Column.TOKEN, Column.EXPERTS}),
        (["seq_id", "layer_idx", "expert_0", "expert_1"],
         {Column.SEQUENCE, Column.LAYER}),
    ],
)  # fmt: skip
def test_names_of_columns(header, wanted):
    assert set(columns_of(header).names) == wanted


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("layer,expert_ids\n3,x\n", "must be a list"),
        ("layer,expert_ids\nx,1\n", "layer must be a whole number"),
        ('layer,expert_ids\n3,"[1, 1]"\n', "twice"),
        ("layer,expert_ids\n3,99999\n", "expert ids must be"),
        ("layer,expert_ids\n3\n", "not as many values"),
        ("layer,expert_ids\n3,1.5\n", "must be integers"),
        ("layer,expert_id,count\n3,1,-4\n", "count must be"),
        ("layer,expert_id,count\n3,1,0\n", "counted nothing"),
        ("layer,expert_id\n3,1\n", "need a column that numbers tokens"),
        ("layer,expert_ids\n", "no token"),
        ("layer,something\n3,1\n", "no column of experts"),
    ],
)
def test_hostile_tables(importing, tmp_path, text, message):
    (tmp_path / "a.csv").write_text(text)
    with pytest.raises(InvalidTraceError, match=message):
        importing(tmp_path / "a.csv", format="table")


def test_rows_of_different_tokens_are_no_layers(importing, tmp_path):
    table = [{"layer": n % 50, "token_idx": n, "experts": [1, 2]} for n in range(5000)]
    with pytest.raises(InvalidTraceError, match="are of different tokens"):
        importing(write(tmp_path / "a", table, "jsonl"))


def test_options_that_contradict_the_table_are_refused(importing, tmp_path, ids):
    path = write(tmp_path / "a", routes(ids), "jsonl")
    for options, message in (
        ({"top_k": 8}, "routes list up to 10"),
        ({"layers": (1, 2, 3)}, "leave it out"),
        ({"num_experts": 4}, "outside 0..3"),
    ):
        with pytest.raises(InvalidTraceError, match=message):
            importing(path, **options)
    assert importing(path, top_k=10, layers=LAYERS).num_tokens == 12


def test_parquet_without_its_library_says_how_to_get_it(
    importing, tmp_path, monkeypatch
):
    (tmp_path / "a").write_bytes(b"PAR1" + bytes(40) + b"PAR1")
    pytest.importorskip("pyarrow")
    with pytest.raises(InvalidTraceError, match="damaged Parquet"):
        importing(tmp_path / "a")
    monkeypatch.setitem(__import__("sys").modules, "pyarrow", None)
    with pytest.raises(MissingDependencyError, match=r"moetuner\[parquet\]"):
        importing(tmp_path / "a")


def test_counts_of_layers_by_the_names_of_modules(importing, tmp_path):
    table = [
        {"layer": f"model.layers.{layer}.mlp", "expert": e, "count": 10 * layer + e}
        for layer in LAYERS
        for e in range(EXPERTS)
    ]
    trace = importing(write(tmp_path / "a", table, "csv"))
    assert trace.layer_ids.tolist() == list(LAYERS)
    assert trace.counts[0, 1].tolist() == [40 + e for e in range(EXPERTS)]
