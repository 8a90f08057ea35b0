"""`--phase` in every command that reads a recording."""

import json

import numpy as np
import pytest

SIZES = ("--hidden-size", 64, "--expert-hidden-size", 8, "-q")


@pytest.fixture
def recording(folder, ids):
    """30 sequences of 20 tokens: 14 of a prompt, 6 of its answer."""
    return folder.trace(ids, phase=np.tile([0] * 14 + [1] * 6, 30).astype(np.uint8))


def test_one_recording_gives_two_plans(folder, recording):
    reports = {
        phase: folder.plan_json(recording, "--phase", phase, *SIZES)
        for phase in ("prefill", "decode", "all")
    }
    tokens = {
        phase: report["plan_tokens"] + report["score_tokens"]
        for phase, report in reports.items()
    }
    assert tokens == {"prefill": 420, "decode": 180, "all": 600}
    kinds = {
        phase: report["options"]["batch_kind"] for phase, report in reports.items()
    }
    assert kinds == {"prefill": "sequences", "decode": "mixed", "all": "sequences"}
    assert reports["all"]["options"]["phase"] is None
    assert len({report["trace_sha256"] for report in reports.values()}) == 1


def test_decode_batches_are_steps_of_the_sequences(folder, recording):
    folder.plan(recording, "--phase", "decode", "--batch-tokens", 8, *SIZES)
    (score,) = json.loads(
        folder.run("evaluate", recording, folder.out, "--json").stdout
    )
    assert score["num_tokens"] == 180  # the plan's own phase
    assert score["pricing"]["phase"] == "decode"
    assert len(score["batch_seconds"]) == 23  # of at most 8
    shown = folder.run("evaluate", recording, folder.out, "--batch-tokens", 2048).stdout
    assert "Batches of about 30 tokens, at most 2,048" in shown


def test_another_phase_may_be_scored(folder, recording):
    folder.plan(recording, "--phase", "decode", *SIZES)
    command = ("evaluate", recording, folder.out, "--json", "--phase")
    (prefill,) = json.loads(folder.run(*command, "prefill").stdout)
    assert prefill["num_tokens"] == 420
    assert prefill["pricing"]["batch_kind"] == "sequences"
    (everything,) = json.loads(folder.run(*command, "all").stdout)
    assert everything["num_tokens"] == 600
    assert everything["pricing"]["phase"] is None


def test_reports_and_certificates_take_the_plans_phase(folder, recording):
    folder.plan(recording, "--phase", "decode", *SIZES)
    page = folder.path / "report.html"
    result = folder.run("report", recording, folder.out, "--out", page)
    assert result.exit_code == 0, result.stderr
    assert "tokens of decode" in result.stdout
    certified = folder.run(
        "certify", recording, folder.out, "--time-limit", 1, "--json", "--quiet"
    )
    assert json.loads(certified.stdout)["pricing"]["phase"] == "decode"


def test_drift_weighs_a_plan_on_tokens_of_its_phase(folder, recording):
    folder.plan(recording, "--phase", "decode", *SIZES, solver="joint")
    result = folder.run(
        *("drift", folder.out, recording, "--time-limit", 1, "--json", "--quiet")
    )
    assert result.exit_code in (0, 3), result.stderr
    told = json.loads(result.stdout)
    tokens = {each["num_tokens"] for each in told["placements"]}
    assert len(tokens) == 1
    assert tokens.pop() % 6 == 0  # answers of 6 tokens, held out with their prompts


def test_describe_tells_of_one_phase(folder, recording):
    result = folder.run("describe", recording, "--phase", "decode", "--json")
    assert json.loads(result.stdout)["num_tokens"] == 180
    shown = folder.run("describe", recording).stdout
    assert "420 prefill, 180 decode" in shown


@pytest.mark.parametrize("command", ["plan", "describe"])
def test_a_recording_that_does_not_tell_is_refused(folder, ids, command):
    trace = folder.trace(ids)
    if command == "plan":
        result = folder.plan(trace, "--phase", "decode", *SIZES)
    else:
        result = folder.run("describe", trace, "--phase", "decode")
    assert result.exit_code == 2
    assert (
        result.stderr.splitlines()[-1].startswith(
            "error: --phase decode: this recording does not tell"
        )
        or "phase=decode: this recording does not tell" in result.stderr
    )
    assert "--phase all" in result.stderr
