"""One honest sentence about what a placement is worth."""

from __future__ import annotations

from typing import TYPE_CHECKING

from moetuner.evaluation.cost import Homes, Wire
from moetuner.planning.baselines import BASELINES
from moetuner.problem import Objective

if TYPE_CHECKING:
    from collections.abc import Sequence

    from moetuner.evaluation.evaluate import GainInterval
    from moetuner.planning.baselines import Rival
    from moetuner.planning.comparison import Comparison, Scored
    from moetuner.planning.plan import Candidate, PlanReport

_SAME = 1e-3  # relative differences in time that are not worth a word
_OF_TRAFFIC = (Objective.LINK_TRAFFIC.value, Objective.TOTAL_TRAFFIC.value)


def verdict(report: PlanReport | Comparison) -> str:
    """Say what was gained on held-out data over baselines, or that nothing was.

    A gain is claimed only when the bootstrap interval leaves out zero.
    """
    result = report.result
    reason = _no_gain_possible(report)
    if reason:
        return reason
    if result is report.baseline:
        return "This is the contiguous baseline itself: nothing to gain by definition."
    sentences = [_gain_sentence(report)]
    if result.gain is not None:
        sentences += [*_rival(report.rival, report.baseline.name), *_traces(report)]
    return " ".join([*sentences, *_notes(report)])


def _gain_sentence(report: PlanReport | Comparison) -> str:
    """The gain over the baseline, claimed only where that is certain."""
    result, baseline = report.result, reference_name(report)
    if result.gain is None:
        return "What is scored is a single sequence: no interval, no gain claimed."
    gain = result.gain
    where = "held-out data" if report.held_out else "data that it may have seen"
    if report.domains:
        where += " of the first trace"
    percent = f"{abs(gain.gain):.1%}"
    if not gain.certain:
        return (
            f"No gain to be had: {result.name} is {percent} "
            f"{'faster' if gain.gain >= 0 else 'slower'} than {baseline} in "
            f"modelled time on {where}, but the {_interval(gain)} does not leave out "
            f"zero."
        )
    if gain.gain > 0:
        return (
            f"{result.name} needs {percent} less modelled time than {baseline} "
            f"on {where} ({_interval(gain)})."
        )
    return (
        f"{result.name} is WORSE than {baseline} by {percent} on "
        f"{where} ({_interval(gain)}): do not use it."
    )


def _rival(rival: Rival | None, reference: str) -> list[str]:
    """The gain over the best baseline, where that is not the reference itself."""
    if rival is None or rival.gain is None or rival.name == reference:
        return []
    gain, name = rival.gain, rival.name
    if not gain.certain:
        less = "less" if gain.gain >= 0 else "more"
        return [
            f"Over the best baseline, {name}, no gain is certain: "
            f"{abs(gain.gain):.1%} {less} ({_gain_interval(gain)})."
        ]
    if gain.gain > 0:
        return [
            f"It needs {gain.gain:.1%} less than the best baseline, {name} "
            f"({_gain_interval(gain)})."
        ]
    return [
        f"The best baseline, {name}, is better: the result takes {-gain.gain:.1%} "
        f"longer ({_gain_interval(gain)})."
    ]


def _traces(report: PlanReport | Comparison) -> list[str]:
    """What other recordings say, each by itself and all as they count."""
    sentences = []
    for domain in report.domains:
        said = f"On {domain.name}: "
        gain, rival = domain.gain, domain.rival
        if gain is None:
            sentences.append(f"{said}a single sequence, no interval.")
            continue
        said += f"{_signed(gain)} than {reference_name(report)}"
        if rival is not None and rival.gain and rival.name != report.baseline.name:
            said += f", {_signed(rival.gain)} than its best baseline, {rival.name}"
        sentences.append(f"{said}.")
    overall = report.overall
    if overall is not None:
        said = f"All traces as they count: a held-out batch takes {_less(overall.gain)}"
        said += f" than with {reference_name(report)}"
        if overall.rival not in ("", report.baseline.name):
            best = f"the best baseline, {overall.rival}"
            said += f", {_less(overall.rival_gain)} than with {best}"
        sentences.append(f"{said}.")
    return sentences


def _batches(report: PlanReport | Comparison) -> list[str]:
    """The mean batch against the best other placement, where batches are several."""
    own = report.result.evaluation
    others = [c for c in report.candidates if c is not report.result]
    if report.overall is not None or own.batch_seconds.size < 2 or not others:
        return []  # of several traces all that count is said already
    best = min(others, key=lambda c: c.evaluation.batch_seconds_mean)
    gain = 1 - own.batch_seconds_mean / (best.evaluation.batch_seconds_mean or 1.0)
    about = f"The mean batch of about {own.batch_tokens} tokens takes"
    return [f"{about} {_less(gain)} than with the best of the others, {best.name}."]


def _signed(gain: GainInterval) -> str:
    unsure = "" if gain.certain else ", which is not certain"
    return f"{_less(gain.gain)} ({_gain_interval(gain)}{unsure})"


def _less(gain: float) -> str:
    return f"{abs(gain):.1%} {'less' if gain >= 0 else 'MORE'}"


def _gain_interval(gain: GainInterval) -> str:
    return f"95% interval of the gain {gain.low:+.1%} to {gain.high:+.1%}"


def _interval(gain: GainInterval) -> str:
    return f"95% interval {gain.low:+.1%} to {gain.high:+.1%}"


def reference_name(report: PlanReport | Comparison) -> str:
    """What gains are measured against, as a sentence calls it."""
    name = report.baseline.name
    return "contiguous blocks" if name == "contiguous" else name


def _no_gain_possible(report: PlanReport | Comparison) -> str:
    if report.topology.num_ranks == 1:
        return "No gain to be had: on one rank every placement is the same."
    cost, topology = report.cost, report.topology
    alike = topology.num_nodes == 1 or topology.ranks_per_node == 1
    anywhere = cost.homes is Homes.UNIFORM and alike
    if report.result.placement.slots_per_rank == 1 and (
        anywhere or cost.wire is Wire.ALLGATHER
    ):
        return (
            "No gain to be had: with one expert per rank a placement only renames "
            "ranks, and all links are alike."
        )
    return ""


def _notes(report: PlanReport | Comparison) -> list[str]:
    cost, topology = report.cost, report.topology
    notes = []
    candidates: Sequence[Candidate | Scored] = report.candidates
    own = report.result.evaluation
    better = [
        c
        for c in candidates
        if (report.rival is None or c.name not in BASELINES)
        and c.evaluation.modelled_seconds < own.modelled_seconds * (1 - _SAME)
    ]
    if better:  # baselines that are better have their own sentence
        best = min(better, key=lambda c: c.evaluation.modelled_seconds)
        notes.append(f"{best.name} scored better still.")
    notes += _batches(report)
    if cost.wire is Wire.ALLGATHER:
        notes.append(
            "With all-gather every row goes everywhere: no gain in traffic is to be "
            "had, only in load balance."
        )
    elif (
        cost.homes is Homes.UNIFORM
        and report.result.placement.provenance.objective in _OF_TRAFFIC
        and topology.num_nodes == 1
    ):
        notes.append(
            "With homes independent of routing and one node, aligning layers moves no "
            "row less: the gain is load balance."
        )
    return notes
