"""What drift means for a plan in use, in words, a table and JSON."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any

from moetuner._words import SHOWN, amount
from moetuner.planning.baselines import IN_USE
from moetuner.planning.drift import NEW, Drift, batch_size
from moetuner.report.table import LEGEND, score_table
from moetuner.report.terminal import print_content, print_left_out, print_sentences
from moetuner.report.verdict import is_claimed
from moetuner.report.words import interval, number, size

if TYPE_CHECKING:
    from moetuner.evaluation.evaluate import GainInterval


def print_drift(drift: Drift) -> None:
    """Then and now, the scores, the moves, and what to do."""
    scored = drift.comparison
    split = f"scored on {scored.score_tokens:,} others"
    if scored.in_sample:
        split = "scored on the same: nothing was held out"
    print_sentences(
        f"{NEW}: from the placement in use, planned on {scored.plan_tokens:,} of the "
        f"new tokens, {split}; {amount(scored.topology.num_ranks, 'rank')}, "
        f"{scored.topology.ranks_per_node} per node"
    )
    print_content(score_table(scored))
    print_left_out(scored)
    print_sentences(LEGEND)
    print_sentences(then_and_now(drift))
    print_sentences(moves(drift))
    print_sentences(verdict(drift))


def then_and_now(drift: Drift) -> str:
    """What the plan in use cost on its own recording, and what it costs now."""
    own = drift.in_use.evaluation
    gain = gain_over_blocks(drift)
    now = f"now {_ms(own.batch_seconds_mean)} for {batch_size(drift.in_use):,.0f}"
    before = drift.before
    if before is None:
        return (
            f"the plan in use: {now} tokens, {_than_blocks(gain)}; its "
            f"file does not say what it cost before (--recording tells)"
        )
    if before.batch_size is None:
        return (
            f"the plan in use: {_ms(before.batch_seconds)} a batch on the tokens that "
            f"it was planned on, {now} tokens, {_than_blocks(gain)}"
        )
    which = "held out of" if before.held_out else "planned on of"
    then = "unknown" if before.gain is None else _than_blocks(before.gain)
    return (
        f"the plan in use: {_ms(before.batch_seconds)} for {before.batch_size:,.0f} "
        f"tokens {which} its own recording, {then}; {now} "
        f"tokens, {_than_blocks(gain)}"
    )


def moves(drift: Drift) -> str:
    """What has to move for the new plan."""
    moved = drift.moved
    if not moved.num_moved:
        return "moves: none"
    far = int(moved.between_nodes.sum())
    several = drift.comparison.topology.num_nodes > 1
    nodes = f" ({far:,} between nodes)" if several else ""
    return (
        f"moves: {moved.num_moved:,} of {moved.num_replicas:,} experts{nodes}, "
        f"{size(moved.bytes_moved)}, {_ms(drift.move_seconds)} over the busiest link"
    )


def verdict(drift: Drift) -> str:
    """What to do, and why: one sentence, and one more where a baseline is better."""
    said = _decision(drift)
    rival = drift.comparison.rival
    gain = None if rival is None else rival.gain
    if rival is None or gain is None or gain.gain >= 0 or not is_claimed(gain):
        return said
    if rival.name == IN_USE:  # of which `said` told
        return said
    return f"{said} {rival.name} takes {-gain.gain:.1%} less than the new plan."


def _decision(drift: Drift) -> str:
    gain, threshold = drift.gain, drift.options.threshold
    if gain is None:
        why = "nothing was held out" if drift.comparison.in_sample else "no interval"
        return f"Keep the plan in use: {why}, so no gain is claimed; record more."
    if not drift.moved.num_moved:
        return "Keep the plan in use: no new plan was found that saves its moves."
    saves = f"a new plan saves {gain.gain:.1%} of a batch ({_interval(gain)})"
    if gain.gain < 0:
        saves = f"a new plan takes {-gain.gain:.1%} MORE of a batch ({_interval(gain)})"
    if not drift.clears_threshold:
        return (
            f"Keep the plan in use: {saves}, which is not surely more than "
            f"{threshold:.1%}."
        )
    steps = drift.steps_to_pay
    assert steps is not None  # what is surely saved pays at some time
    if not drift.pays:
        return (
            f"Keep the plan in use: {saves}, but its moves pay only after "
            f"{amount(steps, 'batch')}, more than --steps {drift.steps:,}."
        )
    return (
        f"Re-plan: {saves}, surely more than {threshold:.1%}, and its moves have paid "
        f"after {amount(steps, 'batch')}."
    )


def drift_json(drift: Drift) -> dict[str, Any]:
    """All that is printed, with full precision."""
    scored = drift.comparison
    return {
        "verdict": verdict(drift),
        "replan": drift.pays,
        "threshold": drift.options.threshold,
        "steps": drift.steps,
        "steps_to_pay": drift.steps_to_pay,
        "saved_seconds": drift.saved_seconds,
        "gain": _plain(drift.gain),
        "moves": {
            "replicas": drift.moved.num_moved,
            "between_nodes": int(drift.moved.between_nodes.sum()),
            "of": drift.moved.num_replicas,
            "bytes": drift.moved.bytes_moved,
            "seconds": drift.move_seconds,
        },
        "before": _plain(drift.before),
        "now": {
            "batch_seconds": drift.in_use.evaluation.batch_seconds_mean,
            "batch_size": batch_size(drift.in_use),
            "gain": gain_over_blocks(drift),
        },
        "same_recording": drift.same_recording,
        "trace_sha256": scored.trace_sha256,
        "plan_tokens": scored.plan_tokens,
        "score_tokens": scored.score_tokens,
        "held_out": not scored.in_sample,
        "status": scored.result.placement.provenance.status,
        "placements": [
            {"name": each.name, **each.evaluation.to_json(), "gain": _plain(each.gain)}
            for each in scored.candidates
        ],
        "best_baseline": _plain(scored.rival),
        "left_out": dict(scored.left_out),
    }


def gain_over_blocks(drift: Drift) -> float:
    """What the plan in use saves of a batch now, against contiguous blocks."""
    times = {
        each.name: each.evaluation.batch_seconds_mean
        for each in drift.comparison.candidates
    }
    return 1 - times[IN_USE] / times["contiguous"]


def _plain(value: Any) -> dict[str, Any] | None:
    return None if value is None else dataclasses.asdict(value)


def _interval(gain: GainInterval) -> str:
    return f"95% interval {interval(gain)}"


def _than_blocks(gain: float) -> str:
    if abs(gain) < SHOWN:
        return "as long as contiguous blocks"
    return f"{abs(gain):.1%} {'less' if gain > 0 else 'MORE'} than contiguous blocks"


def _ms(seconds: float) -> str:
    return f"{number(seconds * 1e3)} ms"
