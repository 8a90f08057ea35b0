"""`moetuner describe` tells persistent from transient skew."""

import json

import numpy as np
from moetuner.planning.skew import measure_skew
from moetuner.trace import read_trace


def test_json_holds_what_the_library_measures(folder, ids):
    trace = folder.trace(ids)
    options = ("--ranks", 4, "--batch-tokens", 50, "--batch-kind", "mixed")
    told = json.loads(folder.run("describe", trace, *options, "--json").stdout)["skew"]
    found = measure_skew(read_trace(trace), 4, batch_tokens=50, batch_kind="mixed")
    assert told == found.to_json()


def test_table_and_sentence_fit_a_terminal(folder, ids):
    shown = folder.run("describe", folder.trace(ids), "--batch-tokens", 50).stdout
    lines = shown.splitlines()
    start = next(i for i, line in enumerate(lines) if line.startswith("Fullest of 8"))
    table = [line.rstrip() for line in lines[start : start + 6]]
    assert (
        table[0].rstrip() == "Fullest of 8 ranks over the mean rank (layers from, to)"
    )
    assert "mean of 12 batches" in table[1]
    assert max(map(len, table)) <= 80
    assert "A static balance removes" in lines[-1]


def test_more_ranks_than_experts_are_refused_by_name(folder, ids):
    result = folder.run("describe", folder.trace(ids), "--ranks", 17)
    assert result.exit_code == 2
    assert "--ranks must be 1..16" in result.stderr


def test_a_trace_without_a_token_is_described(folder):
    trace = folder.trace(np.full((40, 2, 2), -1, np.int16))
    result = folder.run("describe", trace, "--json")
    assert result.exit_code == 0, result.stderr
    assert json.loads(result.stdout)["skew"]["blocks"] == [1.0, 1.0]


def test_decoded_tokens_are_mixed_unless_told(folder, ids):
    phase = (np.arange(600) % 20 >= 10).astype(np.uint8)
    trace = folder.trace(ids, phase=phase)
    for options, kind, batches in (
        ((), "sequences", 12),
        (("--phase", "prefill"), "sequences", 6),
        (("--phase", "decode"), "mixed", 10),  # one token of a sequence in each
        (("--phase", "decode", "--batch-kind", "sequences"), "sequences", 6),
    ):
        asked = ("describe", trace, "--batch-tokens", 50, *options, "--json")
        told = json.loads(folder.run(*asked).stdout)["skew"]
        assert (told["batch_kind"], told["num_batches"]) == (kind, batches)
