"""Tokens of one phase, and parts of it that share no request with the other part."""

from dataclasses import replace

import numpy as np
import pytest
from moetuner.errors import InvalidTraceError
from moetuner.trace import CountTrace, TraceMetadata, split_by_sequence
from moetuner.trace.phases import Phase, of_phase, only_decodes, split_of_phase
from strategies import make_trace, random_ids


def recording(prompt=5, answer=3, num_sequences=8):
    """Prompts of 5 tokens and answers of 3, one after the other."""
    length = prompt + answer
    ids = random_ids(np.random.default_rng(0), length * num_sequences, 2, 8, 2)
    phase = np.tile([0] * prompt + [1] * answer, num_sequences)
    return make_trace(
        ids,
        8,
        sequence=np.repeat(np.arange(num_sequences), length).astype(np.int32),
        position=np.tile(np.arange(length), num_sequences).astype(np.int32),
        phase=phase.astype(np.uint8),
    )


def test_tokens_of_a_phase_are_kept_in_order():
    trace = recording()
    prefill, decode = (of_phase(trace, phase) for phase in Phase)
    assert (prefill.num_tokens, decode.num_tokens) == (40, 24)
    assert prefill.position.max() == 4
    assert decode.position.tolist() == [5, 6, 7] * 8
    assert np.array_equal(decode.topk_ids, trace.topk_ids[trace.phase == 1])
    assert of_phase(trace, None) is trace
    assert of_phase(decode, Phase.DECODE) is decode
    assert only_decodes(decode)
    assert not only_decodes(prefill)
    assert not only_decodes(trace)


@pytest.mark.parametrize(
    ("said", "phase"),
    [
        ("decode (greedy, up to 512 new tokens, batch 1)", Phase.DECODE),
        ("Prefill, whole prompts, one forward each", Phase.PREFILL),
    ],
)
def test_a_recording_may_say_it_of_all_its_tokens(said, phase):
    about = TraceMetadata(extra={"phase": said})
    trace = replace(recording(), phase=None, metadata=about)
    found = of_phase(trace, phase)
    assert found.num_tokens == trace.num_tokens
    assert only_decodes(found) == (phase is Phase.DECODE)
    (other,) = set(Phase) - {phase}
    with pytest.raises(InvalidTraceError, match="none of the 64 tokens of the record"):
        of_phase(trace, other)


@pytest.mark.parametrize(
    "said", ["", "steps 0-1 prefill, later ones decode", "prefill and decode", "both"]
)
def test_what_is_not_told_is_not_guessed(said):
    """Neither positions nor passes tell where a prompt ends."""
    trace = replace(recording(), phase=None)
    trace = replace(trace, metadata=TraceMetadata(extra={"phase": said}))
    with pytest.raises(
        InvalidTraceError, match="phase=decode: this recording does not tell which"
    ):
        of_phase(trace, Phase.DECODE)


def counted(said=""):
    return CountTrace(
        counts=np.full((2, 1, 4), 3),
        num_tokens=np.array([12, 12]),
        layer_ids=np.array([0], np.int32),
        metadata=TraceMetadata(extra={"phase": said}),
    )


def test_counts_tell_it_of_all_or_not_at_all():
    known = counted("decode")
    assert of_phase(known, Phase.DECODE) is known
    assert not only_decodes(known)
    with pytest.raises(InvalidTraceError, match="none of the 24 tokens"):
        of_phase(known, Phase.PREFILL)
    with pytest.raises(InvalidTraceError, match="phase=decode: counts do not tell"):
        of_phase(counted(), Phase.DECODE)


@pytest.mark.parametrize("phase", Phase)
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_both_phases_are_split_by_the_same_requests(phase, seed):
    trace = recording(num_sequences=21)
    trace = replace(trace, request=(trace.sequence // 3).astype(np.int32))
    whole = split_by_sequence(trace, 0.4, seed)
    split = split_of_phase(trace, 0.4, seed, phase)
    assert split.held_out
    for part in ("plan", "score"):
        of_whole, own = getattr(whole, part), getattr(split, part)
        assert set(own.request.tolist()) == set(of_whole.request.tolist())
        assert (own.phase == (phase is Phase.DECODE)).all()
    assert not set(split.plan.request.tolist()) & set(split.score.request.tolist())


def test_a_part_without_a_token_of_the_phase_is_named():
    trace = recording()
    phase = trace.phase.copy()
    phase[trace.sequence > 0] = 0  # one sequence alone was answered
    trace = replace(trace, phase=phase)
    with pytest.raises(InvalidTraceError, match=r"the (planning|held-out) part is of"):
        split_of_phase(trace, 0.5, 0, Phase.DECODE)
