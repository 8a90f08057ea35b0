"""The scripts that made the shipped trace, on a tiny model."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from moetuner import demo_trace, read_trace
from moetuner.trace.description import describe

EXAMPLE = Path(__file__).parents[2] / "examples" / "train_demo_model"


def run(script, *arguments):
    subprocess.run(
        [sys.executable, EXAMPLE / script, *map(str, arguments)],
        check=True,
        timeout=120,
    )


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    """The text of the Python that runs the tests."""
    out = tmp_path_factory.mktemp("corpus") / "corpus.npz"
    run("corpus.py", out)
    return out


@pytest.mark.slow
def test_no_held_out_text_is_trained_on(corpus):
    with np.load(corpus) as texts:
        kinds = {name.split("/")[1] for name in texts.files}
        assert kinds >= {"library code", "docstrings", "tables", "language reference"}
        for kind in kinds - {"tables"}:  # these share their boilerplate
            held_out = texts[f"held_out/{kind}"].tobytes()
            train = texts[f"train/{kind}"].tobytes()
            middle = len(held_out) // 2
            assert held_out[middle : middle + 200] not in train


@pytest.mark.slow
def test_training_records_a_readable_trace(corpus, tmp_path):
    torch = pytest.importorskip("torch")
    recording, log = tmp_path / "recording.npz", tmp_path / "log.json"
    weights = tmp_path / "weights.pt"
    run(
        "train.py", corpus, "--out", recording, "--log", log, "--tiny", "--steps", 40,
        "--batch", 8, "--tokens", 600, "--log-every", 39, "--weights", weights,
    )  # fmt: skip
    run("convert.py", recording, tmp_path / "trace.safetensors")

    trace = read_trace(tmp_path / "trace.safetensors")
    assert trace.topk_ids.shape[1:] == (2, 2)
    assert 300 < trace.num_tokens <= 600
    assert trace.ranked
    kept = torch.load(weights, weights_only=True)
    assert kept["config"]["experts"] == trace.num_experts
    assert kept["weights"]["blocks.1.experts.down"].shape == (8, 16, 32)
    first, last = json.loads(log.read_text())["log"]
    assert last["loss"] < first["loss"]


def test_the_page_says_what_the_shipped_trace_holds():
    trace = demo_trace()
    page = (EXAMPLE / "README.md").read_text()
    description = describe(trace)
    assert f"{trace.num_tokens:,} held-out bytes" in page
    assert f"in {description.num_sequences} sequences" in page
    assert trace.topk_ids.shape[1:] == (12, 4)
    assert trace.num_experts == 64
    assert trace.metadata.model == "moetuner-demo-moe"
