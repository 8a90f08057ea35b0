"""Plans for prefill and for decode of one recording, and what they are scored on."""

from dataclasses import replace

import numpy as np
import pytest
from moetuner.errors import InvalidProblemError
from moetuner.evaluation.cost import CostModel
from moetuner.evaluation.models import ModelShape
from moetuner.evaluation.workload import BatchKind
from moetuner.placement.topology import Topology
from moetuner.planning.comparison import compare_placements
from moetuner.planning.options import PlanOptions
from moetuner.planning.plan import plan_trace
from moetuner.planning.provenance import options_of, pricing_of
from moetuner.planning.recordings import split_recordings
from moetuner.trace.phases import Phase
from strategies import make_trace

SEQUENCES, PROMPT, ANSWER = 40, 12, 6
COST = CostModel(shape=ModelShape(hidden_size=64, expert_hidden_size=8))
RANKS = Topology(num_ranks=4, ranks_per_node=4)


@pytest.fixture(scope="module")
def trace():
    """Prompts choose experts 0 to 7, answers 8 to 15, each with a favourite pair."""
    rng = np.random.default_rng(3)
    length = PROMPT + ANSWER
    phase = np.tile([0] * PROMPT + [1] * ANSWER, SEQUENCES).astype(np.uint8)
    ids = np.empty((SEQUENCES * length, 2, 2), np.int16)
    for token in range(len(ids)):
        for layer in range(2):
            first = min(int(rng.exponential(1.5)), 7)
            second = (first + 1 + int(rng.integers(7))) % 8
            ids[token, layer] = np.array([first, second]) + 8 * phase[token]
    return make_trace(
        ids,
        16,
        sequence=np.repeat(np.arange(SEQUENCES), length).astype(np.int32),
        phase=phase,
    )


def planned(trace, phase, **options):
    asked = PlanOptions(
        solver="lpt", cost=COST, baselines="none", batch_tokens=64, phase=phase
    )
    return plan_trace(trace, RANKS, replace(asked, **options))


def test_each_phase_is_planned_and_scored_alone(trace):
    found = {phase: planned(trace, phase) for phase in Phase}
    assert found[Phase.PREFILL].plan_tokens % PROMPT == 0
    assert found[Phase.DECODE].plan_tokens % ANSWER == 0
    requests = {(each.plan_tokens + each.score_tokens) for each in found.values()}
    assert requests == {SEQUENCES * PROMPT, SEQUENCES * ANSWER}
    for phase, other in zip(Phase, reversed(Phase), strict=True):
        own = found[phase].result
        assert own.evaluation.imbalance_mean < 1.3
        crossed = compare_placements(
            trace,
            {"own": own.placement, "other": found[other].result.placement},
            COST,
            batch_tokens=64,
            phase=phase,
        )
        own_score, other_score = (
            each.evaluation
            for each in crossed.candidates
            if each.name in ("own", "other")
        )
        assert own_score.batch_seconds_mean < other_score.batch_seconds_mean


def test_no_token_of_a_planned_request_is_ever_scored(trace):
    """Whatever phase was planned, and whatever phase is scored."""
    sequences = {}
    for phase in (None, *Phase):
        (recording,) = split_recordings([trace], 0.5, 3, phase)
        sequences[phase] = [
            set(part.sequence.tolist()) for part in (recording.plan, recording.score)
        ]
    for planned_on, _ in sequences.values():
        for _, scored_on in sequences.values():
            assert not planned_on & scored_on
    decode = planned(trace, Phase.DECODE).result.placement
    whole = compare_placements(trace, {"decode": decode}, COST, batch_tokens=64)
    assert whole.held_out
    assert whole.score_tokens == (PROMPT + ANSWER) * len(sequences[None][1])


def test_the_file_tells_the_phase_and_makes_the_plan_again(trace):
    first = planned(trace, Phase.DECODE, batch_kind=BatchKind.MIXED).result.placement
    assert first.provenance.trace_sha256 == trace.sha256()
    assert pricing_of(first).phase is Phase.DECODE
    assert "tokens of decode" in pricing_of(first).words()
    again = plan_trace(trace, RANKS, options_of(first)).result.placement
    assert again.sha256() == first.sha256()


def test_a_plan_of_all_tokens_has_the_phase_too(trace):
    found = planned(trace, Phase.DECODE, refit=True)
    (recording,) = split_recordings([trace], 1.0, 0, Phase.DECODE)
    assert recording.plan.num_tokens == SEQUENCES * ANSWER
    assert found.refit.placement.provenance.options["phase"] == "decode"


def test_a_phase_that_does_not_exist_is_refused():
    with pytest.raises(InvalidProblemError, match="phase must be one of prefill, dec"):
        PlanOptions(phase="training")
