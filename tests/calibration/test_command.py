"""`moetuner calibrate` on Gloo ranks, in tiny sizes; and what goes wrong."""

import json
import re
import socket
import subprocess
import sys

import pytest
from forked import Done, run_programs, torchrun
from moetuner.evaluation.hardware_file import read_hardware

torch = pytest.importorskip("torch", reason="torch is not installed")

TINY = [
    *("--seconds", "0.3", "--device", "cpu", "--hidden-size", "96"),
    *("--expert-hidden-size", "96", "--experts", "8", "--top-k", "2"),
]


def run(*arguments, cwd, ranks=1, code=0):
    """The command, alone or on so many ranks, and what they all said."""
    words = ["-m", "moetuner", "calibrate", *TINY, *arguments]
    every = run_programs([words] * ranks, cwd=cwd, ranked=ranks > 1)
    codes = [done.returncode for done in every]
    assert codes == [code] * ranks, [done.stdout + done.stderr for done in every]
    return Done(
        returncode=code,
        stdout="".join(done.stdout for done in every),
        stderr="".join(done.stderr for done in every),
    )


@pytest.fixture(scope="module")
def calibrated(tmp_path_factory):
    """A folder with all files of a calibration on four ranks, and what was printed."""
    folder = tmp_path_factory.mktemp("calibrated")
    pytest.importorskip("matplotlib", reason="matplotlib is not installed")
    done = run(
        *("--out", "cpus.toml", "--out-fixed", "fixed.toml", "--plot", "fit.svg"),
        *("--measurements", "times.json"),
        cwd=folder,
        ranks=4,
    )
    return folder, done


def test_four_ranks_write_two_machines(calibrated):
    folder, done = calibrated
    for name, form in (("cpus", "--out"), ("fixed", "--out-fixed")):
        found = read_hardware(folder / f"{name}.toml")
        assert found.name == name
        assert found.ranks_per_node == 4
        assert found.calibration.command.startswith("torchrun --nproc-per-node 4")
        assert form in found.calibration.command
        assert found.calibration.machine.startswith("4 ranks, ")
        assert socket.gethostname() not in found.calibration.machine
        parts = {each.part: each.points for each in found.calibration.residuals}
        assert {"dispatch", "combine", "experts", "layer", "all"} <= set(parts)
        assert found.grouped_gemm[0].hidden_size == 96
    assert done.stdout.count("wrote ") == 4  # rank 0 alone says so
    assert "Fitted against measured times" in done.stdout
    assert "note: links between nodes: not measured, as h100" in done.stderr
    assert not [path for path in folder.iterdir() if path.name.startswith(".")]


@pytest.mark.slow
def test_torchrun_starts_it(tmp_path):
    words = ["-m", "moetuner", "calibrate", *TINY, "--out", "cpus.toml"]
    torchrun(*words, ranks=2, cwd=tmp_path)
    assert read_hardware(tmp_path / "cpus.toml").ranks_per_node == 2


def test_every_time_is_in_the_file_of_measurements(calibrated):
    folder, _ = calibrated
    told = json.loads((folder / "times.json").read_text())
    measured, fitted = told["measured"], told["fitted"]
    assert len(measured["links"]) >= 6  # three directions, two sizes at least
    assert {each["collective"] for each in measured["collectives"]} == {
        *("all-to-all", "all-gather", "reduce-scatter"),
    }
    loads = {each["case"]["load"] for each in measured["exchanges"]}
    assert loads == {"local", "next rank", "to one rank", "from one rank", "uniform"}
    assert {each["case"]["num_ranks"] for each in measured["exchanges"]} == {2, 4}
    assert measured["permutes"]
    for form in ("exact", "fixed"):
        for one in fitted[form]:
            assert one["measured"] > 0
            assert one["error"] == pytest.approx(one["fitted"] / one["measured"] - 1)


def test_the_plot_is_drawn(calibrated):
    assert "<svg" in (calibrated[0] / "fit.svg").read_text()


def test_the_file_plans(calibrated):
    from moetuner.trace import generator, write_trace

    folder, _ = calibrated
    trace = generator.topic_trace(
        generator.TOPIC_PRESETS["mixtral"], num_tokens=400, seed=0
    )
    write_trace(trace, folder / "trace.safetensors")
    done = subprocess.run(
        [
            *(sys.executable, "-m", "moetuner", "plan", "trace.safetensors"),
            *("--ranks", "4", "--solver", "lpt", "--hardware", "cpus.toml"),
            *("--out", "plan.json", "--time-limit", "2"),
        ],
        cwd=folder,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    planned = json.loads((folder / "plan.json").read_text())
    assert '"name": "cpus"' in json.dumps(planned)


def test_one_rank_measures_what_it_can_and_says_how_to_measure_more(tmp_path):
    done = run(
        *("--out", "one.toml", "--like", "h200", "--values", "float32"), cwd=tmp_path
    )
    found = read_hardware(tmp_path / "one.toml")
    assert found.grouped_gemm[0].weight_bytes == 4
    assert "torchrun --nproc-per-node" in done.stderr
    assert "links inside a node: not measured, as h200" in found.sources
    assert found.calibration.command.startswith("moetuner calibrate")
    assert found.grouped_gemm


# One rank of those that the command is another of: it joins, and is gone.
GONE = """
import os
from moetuner.calibration.measure import join
from moetuner.calibration.options import CalibrationOptions
from moetuner.calibration.samples import LayerShape
shape = LayerShape(hidden_size=96, inner_size=96, num_experts=8, top_k=2)
with join(CalibrationOptions(device="cpu", seconds=0.3, shapes=(shape,))):
    os._exit(0)
"""


def test_a_rank_that_ends_is_an_error_and_the_former_file_stays(tmp_path):
    (tmp_path / "x.toml").write_text("as it was")
    command = ["-m", "moetuner", "calibrate", *TINY, "--out", "x.toml"]
    said, _ = run_programs([command, ["-c", GONE]], cwd=tmp_path)
    assert said.returncode == 1, said
    assert re.search(
        r"error: calibrate: .*a rank ended or no longer answers", said.stderr
    )
    assert (tmp_path / "x.toml").read_text() == "as it was"
    assert [path.name for path in tmp_path.iterdir()] == ["x.toml"]


def test_a_layer_that_is_too_large_is_named_before_it_is_made(tmp_path):
    done = run(
        *("--out", "x.toml", "--hidden-size", 2**20, "--expert-hidden-size", 2**20),
        cwd=tmp_path,
        code=1,
    )
    assert re.search(
        r"error: calibrate: rank 0: too little memory on cpu for a layer .*: wanted "
        r"[\d.]+ GB, [\d.]+ GB are free for a rank: measure a smaller layer",
        done.stderr,
    )
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--out", "no/x.toml"], "no/x.toml: cannot write there"),
        (["--out", "x.toml", "--out-fixed", "x.toml"], "two of the files to write"),
        (["--out", "x.toml", "--plot", "x.pdf"], "wanted a name with .svg or .png"),
        (["--out", "x.toml", "--like", "abacus"], "--like must be one of a100"),
        (["--out", "x.toml", "--model", "abacus"], "--model abacus: not in the table"),
        (["--out", "x.toml", "--top-k", "9"], "--top-k 9 is more than"),
        (["--out", "x.toml", "--seconds", "0"], "--seconds must be positive"),
    ],
)
def test_wrong_usage_is_refused_before_anything_is_measured(
    tmp_path, monkeypatch, arguments, said
):
    from moetuner.cli import app
    from typer.testing import CliRunner

    monkeypatch.chdir(tmp_path)
    result = CliRunner().invoke(app, ["calibrate", *TINY, *arguments])
    assert result.exit_code == 2
    assert said in result.stderr
    assert not list(tmp_path.iterdir())


def test_a_model_tells_its_layer():
    from moetuner.calibration.samples import LayerShape, ValueKind
    from moetuner.cli.calibrate import _shapes

    (found,) = _shapes("gpt-oss-20b", None, None, None, None, ValueKind.BFLOAT16)
    assert found == LayerShape(
        hidden_size=2880, inner_size=2880, num_experts=32, top_k=4
    )
    (other,) = _shapes("gpt-oss-20b", None, 64, None, 2, ValueKind.FLOAT16)
    assert (other.inner_size, other.top_k, other.values) == (64, 2, ValueKind.FLOAT16)


def test_half_a_layer_is_refused(tmp_path, monkeypatch):
    from moetuner.cli import app
    from typer.testing import CliRunner

    monkeypatch.chdir(tmp_path)
    result = CliRunner().invoke(app, ["calibrate", "--out", "x", "--top-k", "2"])
    assert result.exit_code == 2
    assert "--hidden-size" in result.stderr


def test_without_torch_it_says_how_to_get_it(tmp_path):
    program = (
        "import sys; sys.modules['torch'] = None\n"
        "from moetuner.cli import app\n"
        "app(['calibrate', '--out', 'x.toml'])"
    )
    done = subprocess.run(
        [sys.executable, "-c", program],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 1
    assert "error: calibrate needs torch: pip install 'moetuner[torch]'" in done.stderr
    assert not list(tmp_path.iterdir())
