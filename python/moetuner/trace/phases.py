"""Prefill and decode: which tokens of a recording were which.

A prompt is routed many tokens at a time, an answer one token a step. So a plan for the
one is not the best for the other, and serving engines that separate both have a
placement for each.
"""

from __future__ import annotations

import enum
from dataclasses import replace

import numpy as np

from moetuner._words import amount
from moetuner.errors import InvalidTraceError
from moetuner.trace.model import CountTrace, Trace
from moetuner.trace.split import Split, select, split_by_sequence

_SAYS_NOTHING = (
    "it needs a recording that tells phases: of SGLang's recorder (per_token), of "
    "Transformers, of responses with their numbers of prompt tokens, or with a "
    "column of phases; `phase` all takes all tokens"
)


class Phase(str, enum.Enum):
    """What a token's forward pass was for."""

    PREFILL = "prefill"
    """A token of a prompt."""
    DECODE = "decode"
    """A token of an answer."""


def of_phase(
    trace: Trace | CountTrace, phase: Phase | None, part: str = "recording"
) -> Trace | CountTrace:
    """The tokens of one phase, in their order; all of them for None.

    Parameters
    ----------
    trace
        With `Trace.phase`, or with metadata that say a phase for all of it (``extra``,
        key ``phase``, a text that begins with "prefill" or "decode").
    phase
        The phase to keep.
    part
        What the trace is, for messages.

    Raises
    ------
    InvalidTraceError
        When the trace does not tell phases, or has no token of this one.
    """
    if phase is None:
        return trace
    if isinstance(trace, CountTrace):
        told = _whole_phase(trace)
        if told is phase:
            return trace
        if told is None:
            raise InvalidTraceError(
                f"split: phase={phase.value}: counts do not tell which tokens were "
                f"prefilled and which decoded; count while only one of both runs, and "
                f"take `phase` all"
            )
        raise _no_token(phase, part, int(trace.num_tokens.sum()))
    phases = trace.phase
    if phases is None:
        told = _whole_phase(trace)
        if told is None:
            raise InvalidTraceError(
                f"split: phase={phase.value}: this recording does not tell which "
                f"tokens were prefilled and which decoded; {_SAYS_NOTHING}"
            )
        phases = np.full(trace.num_tokens, told is Phase.DECODE, np.uint8)
        trace = replace(trace, phase=phases)
    wanted = phases == (phase is Phase.DECODE)
    if not wanted.any():
        raise _no_token(phase, part, trace.num_tokens)
    return trace if wanted.all() else select(trace, wanted)


def split_of_phase(
    trace: Trace | CountTrace, fraction: float, seed: int, phase: Phase | None
) -> Split:
    """Both parts of the *whole* trace, as `split_by_sequence` has them, of one phase.

    So plans for prefill and for decode of one recording are made on the same requests,
    and no token of a request that one was planned on is held out for the other.

    Raises
    ------
    InvalidTraceError
        As `split_by_sequence` and `of_phase`.
    """
    split = split_by_sequence(trace, fraction, seed)
    return replace(
        split,
        plan=of_phase(split.plan, phase, "planning part"),
        score=of_phase(split.score, phase, "held-out part"),
    )


def only_decodes(trace: Trace | CountTrace) -> bool:
    """Whether every token is told to be of an answer."""
    if isinstance(trace, CountTrace) or trace.phase is None:
        return False
    return bool(trace.phase.size and trace.phase.all())


def _whole_phase(trace: Trace | CountTrace) -> Phase | None:
    """The phase that the metadata say of the whole recording."""
    said = trace.metadata.extra.get("phase", "").lower()
    named = [phase for phase in Phase if phase.value in said]
    if len(named) == 1 and said.startswith(named[0].value):
        return named[0]
    return None


def _no_token(phase: Phase, part: str, num_tokens: int) -> InvalidTraceError:
    return InvalidTraceError(
        f"split: phase={phase.value}: none of the {amount(num_tokens, 'token')} of the "
        f"{part} is of it"
    )
