"""`--model`, `--weights`, `--rows`: what is priced, what is told, what is refused."""

import json

import numpy as np
import pytest
from moetuner.trace import TraceMetadata

CONFIG = {
    "model_type": "qwen3_moe",
    "hidden_size": 640,
    "moe_intermediate_size": 96,
    "num_experts": 16,
    "num_experts_per_tok": 2,
    "num_hidden_layers": 3,
    "decoder_sparse_step": 1,
}
ASSUMED = "assuming hidden size 4096, expert hidden size 2048; set --model, or"


@pytest.fixture
def config(folder):
    def write(**changes):
        file = folder.path / "config.json"
        file.write_text(json.dumps({**CONFIG, **changes}))
        return file

    return write


def shape_of(report):
    return report["options"]["cost"]["shape"]


def priced(folder, trace, *options):
    """Shape of a plan, and what was said beside it."""
    result = folder.plan(trace, "--json", *options, solver="contiguous")
    assert result.exit_code == 0, result.stderr
    return shape_of(json.loads(result.stdout)), result.stderr


@pytest.mark.parametrize("quiet", [(), ("-q",)])
def test_a_guessed_shape_is_told_to_the_quiet_too(folder, ids, quiet):
    shape, said = priced(folder, folder.trace(ids), *quiet)
    assert shape["guessed"] is True
    assert ASSUMED in said
    assert len([line for line in said.splitlines() if ASSUMED in line]) == 1


def test_scores_of_such_a_plan_say_it_again(folder, ids):
    trace = folder.trace(ids)
    folder.plan(trace, "-q")
    result = folder.run("evaluate", trace, folder.out, "-q")
    assert ASSUMED in result.stderr
    assert "experts of 4096 x 2048 (assumed)" in " ".join(result.stdout.split())
    scored = folder.run("evaluate", trace, folder.out, "-q", "--json")
    assert json.loads(scored.stdout)[0]["pricing"]["cost"]["shape"]["guessed"] is True


@pytest.mark.parametrize(
    "options",
    [
        ("--hidden-size", 64, "--expert-hidden-size", 8),
        ("--model", "CONFIG"),
        ("--model", "FOLDER"),
    ],
)
def test_a_shape_that_is_said_is_no_guess(folder, ids, config, options):
    paths = {"CONFIG": config(), "FOLDER": folder.path}
    given = [paths.get(each, each) for each in options]
    shape, said = priced(folder, folder.trace(ids), *given)
    assert shape["guessed"] is False
    assert "assuming" not in said


def test_a_config_is_priced_as_its_checkpoint_is_stored(folder, ids, config):
    quantized = {"quant_method": "fp8", "weight_block_size": [128, 128]}
    file = config(quantization_config=quantized)
    shape, said = priced(folder, folder.trace(ids), "--model", file)
    assert (shape["hidden_size"], shape["expert_hidden_size"]) == (640, 96)
    assert (shape["weight_type"], shape["weight_bytes"]) == ("fp8", 1 + 4 / 16384)
    assert "note:" not in said


def test_types_that_are_said_count_before_the_checkpoints(folder, ids, config):
    options = ("--model", config(), "--weights", "nvfp4", "--rows", "fp8")
    shape, _ = priced(folder, folder.trace(ids), *options)
    assert (shape["weight_type"], shape["weight_bytes"]) == ("nvfp4", 0.5625)
    assert (shape["dispatch_type"], shape["dispatch_bytes"]) == ("fp8", 1.03125)
    assert (shape["combine_type"], shape["combine_bytes"]) == ("bf16", 2)
    both, _ = priced(folder, folder.trace(ids), *options[:-1], "fp8, mxfp4")
    assert (both["combine_type"], both["combine_bytes"]) == ("mxfp4", 0.53125)


def test_narrow_rows_and_weights_take_less_time(folder, ids, config):
    trace = folder.trace(ids)
    times = [
        folder.plan_json(
            trace, "--model", config(), "--homes", "uniform", *more, solver="contiguous"
        )["placements"][0]
        for more in ((), ("--rows", "fp8,fp8"), ("--weights", "mxfp4"))
    ]
    plain, rows, weights = times
    assert rows["modelled_seconds"] < plain["modelled_seconds"]
    assert weights["modelled_seconds"] < plain["modelled_seconds"]


def test_a_plan_remembers_its_types(folder, ids, config):
    trace = folder.trace(ids)
    folder.plan(trace, "--model", config(), "--weights", "fp8", "--rows", "fp8")
    shown = " ".join(folder.run("evaluate", trace, folder.out).stdout.split())
    assert "experts of 640 x 96 in fp8 and rows in fp8, back in bf16" in shown
    other = folder.run("evaluate", trace, folder.out, "--weights", "bf16").stdout
    assert "experts of 640 x 96 and rows in fp8, back in bf16" in " ".join(
        other.split()
    )


def test_a_name_of_the_table_is_priced_in_bf16_and_says_so(folder):
    ids = np.arange(600 * 24 * 4, dtype=np.int16).reshape(600, 24, 4) % 32
    trace = folder.trace(ids, num_experts=32)
    shape, said = priced(folder, trace, "--model", "gpt-oss-20b")
    assert (shape["weight_type"], shape["weight_bytes"]) == ("bf16", 2)
    assert "is published with weights in mxfp4; priced in bf16, --weights mxfp4" in said
    shape, said = priced(
        folder, trace, "--model", "openai/gpt-oss-20b", "--weights", "mxfp4"
    )
    assert shape["weight_bytes"] == 0.53125
    assert "note:" not in said


def test_another_number_of_experts_is_an_error(folder, ids):
    trace = folder.trace(ids)
    result = folder.plan(trace, "--model", "deepseek-v3")
    assert result.exit_code == 2
    assert "deepseek-v3 has 256 routed experts a layer, the recording 16" in (
        result.stderr
    )
    assert not folder.out.exists()


def test_other_differences_are_notes(folder, ids, config):
    file = config(num_experts_per_tok=8, num_hidden_layers=12)
    _, said = priced(folder, folder.trace(ids), "--model", file)
    assert "a token of the recording has 2 experts" in said
    assert "3 of the 12 layers with experts" in said
    _, said = priced(folder, folder.trace(ids), "--model", file, "-q")
    assert "note:" not in said


def test_a_recorded_name_that_does_not_fit_is_a_note(folder, ids):
    """The recording may name its model loosely; who names it here may not."""
    about = TraceMetadata(model="deepseek-v3")
    shape, said = priced(folder, folder.trace(ids, metadata=about))
    assert shape["hidden_size"] == 7168
    assert "deepseek-v3 has 256 routed experts" in said
    assert "--model says which one it is" in said


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (("--model", "qwen3-30b"), "did you mean qwen3-30b-a3b"),
        (("--model", "zzz"), "the table has moetuner-demo-moe, deepseek-v2-lite,"),
        (("--model", "none.json"), "model none.json: No such file"),
        (("--model", "TRACE"), "not JSON"),
        (("--rows", "fp7"), "--rows must be OUT or OUT,BACK, each one of fp32, bf16"),
        (("--rows", "int4"), "--rows must be OUT or OUT,BACK"),
        (("--rows", "fp8,fp8,fp8"), "--rows must be OUT or OUT,BACK"),
        (("--weights", "fp7"), "--weights"),
    ],
    ids=str,
)
def test_what_is_not_known_is_refused(folder, ids, options, said):
    trace = folder.trace(ids)
    given = [trace if each == "TRACE" else each for each in options]
    result = folder.plan(trace, *given)
    assert result.exit_code == 2
    assert said in result.stderr
