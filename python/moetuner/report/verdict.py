"""What a placement is worth, in a few honest sentences.

The headline is the mean held-out batch: over the best baseline first, then over what
gains are measured against. A gain is claimed only where its interval leaves out zero.
"""

from __future__ import annotations

from contextlib import suppress
from typing import TYPE_CHECKING

from moetuner._core import Rows
from moetuner._words import SHOWN
from moetuner.errors import InvalidPlacementError
from moetuner.evaluation.cost import Homes
from moetuner.placement.moves import fetched_replicas
from moetuner.planning.baselines import (
    BASELINES,
    IN_USE,
    INTERRUPTED,
    NO_TIME,
    REFERENCE,
)
from moetuner.planning.provenance import part_of
from moetuner.problem import Objective
from moetuner.report.changes import changes_in, words_of
from moetuner.report.words import interval, number

if TYPE_CHECKING:
    from moetuner.evaluation.evaluate import GainInterval
    from moetuner.planning.scores import Comparison

_SAME = 1e-3  # relative differences in time that are not worth a word
_KEEP = "Keep the placement in use: no change that was found is worth its moves."
_OF_TRAFFIC = (Objective.LINK_TRAFFIC.value, Objective.TOTAL_TRAFFIC.value)


def verdict(comparison: Comparison) -> str:
    """Say what was gained on held-out data over baselines, or that nothing was."""
    return " ".join([_verdict(comparison), *_refit(comparison)])


def _verdict(comparison: Comparison) -> str:
    reason = _no_gain_possible(comparison)
    if reason:
        return reason
    if comparison.result is comparison.baseline:
        return "This is the contiguous baseline itself: nothing to gain by definition."
    stays = _stays(comparison)
    return " ".join(
        [
            *([_KEEP] if stays else []),
            *_gains(comparison),
            *_other_traces(comparison),
            *([] if stays else _moves(comparison)),
            *_notes(comparison),
        ]
    )


def _refit(comparison: Comparison) -> list[str]:
    """What is written, where that is not what was scored."""
    if comparison.refit is not None:
        return [
            "Written is the plan that the same options make of all tokens (--refit); "
            "what is scored is the plan of one part."
        ]
    told = comparison.result.placement.provenance.validation
    seconds, tokens = told.get("batch_seconds_mean"), told.get("score_tokens")
    if not isinstance(seconds, (int, float)) or not isinstance(tokens, int):
        return []
    return [
        f"It was made of all tokens of its recording. What validates it is a plan of "
        f"one part by the same options: {number(seconds * 1e3)} ms for the mean batch "
        f"of {tokens:,} held-out tokens."
    ]


def is_claimed(gain: GainInterval) -> bool:
    """Whether a gain or loss is worth a claim: certain, and more than 0.0%."""
    return gain.certain and abs(gain.gain) >= SHOWN


def decisive_gain(comparison: Comparison) -> GainInterval | None:
    """The gain that a headline is about: over the best baseline, where there is one.

    Over what is in use where that baseline is faster: it counts no moves.
    """
    rival = comparison.rival
    if rival is None or _counts_no_moves(comparison):
        return comparison.result.gain
    return rival.gain


def _counts_no_moves(comparison: Comparison) -> bool:
    """Whether a baseline is faster than a plan that had to pay for its moves.

    That is no excuse for a plan that is slower than what is in use.
    """
    own, rival = comparison.result.gain, comparison.rival
    if comparison.baseline.name != IN_USE or rival is None or rival.gain is None:
        return False
    lost = own is not None and is_claimed(own) and own.gain < 0
    return rival.name != IN_USE and rival.gain.gain < 0 and not lost


def _stays(comparison: Comparison) -> bool:
    """Whether the plan is the placement that is in use."""
    pair = comparison.baseline.placement, comparison.result.placement
    return comparison.baseline.name == IN_USE and not (
        fetched_replicas(*pair).size or fetched_replicas(*pair[::-1]).size
    )


def _gains(comparison: Comparison) -> list[str]:
    """Over the best baseline, then over the reference where that is another one."""
    result, rival = comparison.result, comparison.rival
    if result.gain is None:
        return ["What is scored is a single sequence: no interval, no gain claimed."]
    reference = called(comparison.baseline.name)
    if rival is None or rival.gain is None:
        return [_headline(comparison, result.gain, reference)]
    short = {INTERRUPTED, NO_TIME} & set(comparison.left_out.values())
    best = f"the best baseline{' computed' if short else ''}, {called(rival.name)}"
    first = _headline(comparison, rival.gain, best)
    if rival.name == comparison.baseline.name or _stays(comparison):
        return [first]
    return [first, f"Against {reference} it takes {_signed(result.gain)}."]


def _headline(comparison: Comparison, gain: GainInterval, over: str) -> str:
    name, batch = comparison.result.name, _batch(comparison)
    ends = f"95% interval of the gain {interval(gain)}"
    if abs(gain.gain) < SHOWN:
        return (
            f"No gain to be had over {over}: with {name}, {batch} takes as long "
            f"({ends})."
        )
    if not is_claimed(gain):
        return (
            f"No gain to be had over {over}: with {name}, {batch} takes "
            f"{_less(gain.gain)}, but zero lies in the {ends}."
        )
    if gain.gain > 0:
        return f"With {name}, {batch} takes {_than(gain.gain, over)} ({ends})."
    if _counts_no_moves(comparison):
        assert comparison.rival is not None
        return (
            f"With {name}, {batch} takes {_than(gain.gain, over)} ({ends}). But "
            f"{called(comparison.rival.name)} counts no moves."
        )
    return (
        f"{name} is WORSE than {over}: {batch} takes {_less(gain.gain)} ({ends}). "
        f"Do not use it."
    )


def _batch(comparison: Comparison) -> str:
    """What is timed."""
    first = " of the first trace" if comparison.others else ""
    which = "held-out " if comparison.held_out else ""
    known = "was planned on" if comparison.in_sample else "may have seen"
    seen = "" if comparison.held_out else f", of tokens that it {known},"
    if comparison.result.evaluation.batch_seconds.size < 2:
        return f"one batch of all {which}tokens{first}{seen}"
    return f"the mean {which}batch{first}{seen}"


def _other_traces(comparison: Comparison) -> list[str]:
    """What other recordings say, each by itself and all as they count."""
    sentences, reference = [], called(comparison.baseline.name)
    for other in comparison.others:
        gain, rival = other.result.gain, other.rival
        if gain is None:
            sentences.append(f"On {other.name}: a single sequence, no interval.")
            continue
        said = _signed(gain, reference)
        if rival is not None and rival.gain and rival.name != comparison.baseline.name:
            best = f"its best baseline, {called(rival.name)}"
            said = f"{_signed(rival.gain, best)}; {said}"
        sentences.append(f"On {other.name} it takes {said}.")
    overall = comparison.overall
    if overall is not None:
        said = _than(overall.gain, reference)
        if overall.rival not in ("", comparison.baseline.name):
            best = f"the best baseline, {called(overall.rival)}"
            said = f"{_than(overall.rival_gain, best)}, {said}"
        sentences.append(f"All traces as they count: a held-out batch takes {said}.")
    return sentences


def _moves(comparison: Comparison) -> list[str]:
    """What a change from the placement in use costs."""
    name = comparison.baseline.name
    if name == REFERENCE:
        return []
    moved = changes_in(comparison)
    if not moved.num_moved:
        return [f"Nothing moves: {called(name)} holds the same where it is."]
    return [f"From {called(name)}, {words_of(comparison, moved)}"]


def _signed(gain: GainInterval, over: str = "") -> str:
    said = _than(gain.gain, over) if over else _less(gain.gain)
    unsure = "" if gain.certain or abs(gain.gain) < SHOWN else ", not certain"
    return f"{said} ({interval(gain)}{unsure})"


def _than(gain: float, over: str) -> str:
    same = abs(gain) < SHOWN
    return f"{_less(gain)} {'as' if same else 'than'} with {over}"


def _less(gain: float) -> str:
    if abs(gain) < SHOWN:
        return "as long"
    return f"{abs(gain):.1%} {'less' if gain > 0 else 'MORE'}"


def called(name: str) -> str:
    """What a sentence calls a placement."""
    known = {REFERENCE: "contiguous blocks", IN_USE: "the placement in use"}
    return known.get(name, name)


def _no_gain_possible(comparison: Comparison) -> str:
    cost, topology = comparison.cost, comparison.topology
    if topology.num_ranks == 1:
        return "No gain to be had: on one rank every placement is the same."
    alike = topology.num_nodes == 1 or topology.ranks_per_node == 1
    anywhere = cost.homes is Homes.UNIFORM and alike
    if comparison.result.placement.slots_per_rank == 1 and (
        anywhere or cost.wire.rules.rows is Rows.TO_ALL
    ):
        return (
            "No gain to be had: with one expert per rank a placement only renames "
            "ranks, and all links are alike."
        )
    return ""


def _notes(comparison: Comparison) -> list[str]:
    cost, result = comparison.cost, comparison.result
    notes = []
    own = result.evaluation.batch_seconds_mean
    better = [
        c
        for c in comparison.candidates
        if (comparison.rival is None or c.name not in BASELINES)
        and c.evaluation.batch_seconds_mean < own * (1 - _SAME)
    ]
    if better:  # baselines that are better have their own sentence
        best = min(better, key=lambda c: c.evaluation.batch_seconds_mean)
        notes.append(f"{best.name} scored better still.")
    reference = comparison.baseline.name
    if reference not in BASELINES and _used_saw(comparison):
        notes.append(
            f"But {called(reference)} was planned on other tokens of this "
            f"recording: it may have seen what is scored, and looks better than it is."
        )
    if cost.wire.rules.rows is Rows.TO_ALL:
        notes.append(
            "With all-gather every row goes everywhere: no gain in traffic is to be "
            "had, only in load balance."
        )
    elif (
        cost.homes is Homes.UNIFORM
        and result.placement.provenance.objective in _OF_TRAFFIC
        and comparison.topology.num_nodes == 1
    ):
        notes.append(
            "With homes independent of routing and one node, aligning layers moves no "
            "row less: the gain is load balance."
        )
    return notes


def _used_saw(comparison: Comparison) -> bool:
    """Whether what is in use was planned on tokens that the result was not."""
    used = comparison.baseline.placement
    with suppress(InvalidPlacementError):
        own = part_of(comparison.result.placement, comparison.trace_sha256)
        return part_of(used, comparison.trace_sha256) not in (None, own)
    return True
