"""One honest sentence about what a placement is worth."""

from __future__ import annotations

from typing import TYPE_CHECKING

from moetuner.cost import Homes, Wire
from moetuner.pipeline import BASELINES
from moetuner.problem import Objective

if TYPE_CHECKING:
    from collections.abc import Sequence

    from moetuner.comparison import Comparison, Scored
    from moetuner.pipeline import Candidate, PlanReport

_SAME = 1e-3  # relative differences in time that are not worth a word
_OF_TRAFFIC = (Objective.LINK_TRAFFIC.value, Objective.TOTAL_TRAFFIC.value)


def verdict(report: PlanReport | Comparison) -> str:
    """Say what was gained on held-out data over the baseline, or that nothing was.

    A gain is claimed only when the bootstrap interval leaves out zero.
    """
    result = report.result
    reason = _no_gain_possible(report)
    if reason:
        return reason
    if result is report.baseline:
        return "This is the contiguous baseline itself: nothing to gain by definition."
    baseline = reference_name(report)
    if result.gain is None:
        return "What is scored is a single sequence: no interval, no gain claimed."
    gain = result.gain
    where = "held-out data" if report.held_out else "data that it may have seen"
    percent = f"{abs(gain.gain):.1%}"
    interval = f"95% interval {gain.low:+.1%} to {gain.high:+.1%}"
    if not gain.certain:
        text = (
            f"No gain to be had: {result.name} is {percent} "
            f"{'faster' if gain.gain >= 0 else 'slower'} than {baseline} in "
            f"modelled time on {where}, but the {interval} does not leave out "
            f"zero."
        )
    elif gain.gain > 0:
        text = (
            f"{result.name} needs {percent} less modelled time than {baseline} "
            f"on {where} ({interval})."
        )
    else:
        text = (
            f"{result.name} is WORSE than {baseline} by {percent} on "
            f"{where} ({interval}): do not use it."
        )
    return " ".join([text, *_notes(report)])


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
    best = min(candidates, key=lambda c: c.evaluation.modelled_seconds)
    seconds = report.result.evaluation.modelled_seconds
    if best.evaluation.modelled_seconds < seconds * (1 - _SAME):
        kind = "The baseline " if best.name in BASELINES else ""
        notes.append(f"{kind}{best.name} scored better still.")
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
