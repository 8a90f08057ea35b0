"""One honest sentence about what a placement is worth."""

from __future__ import annotations

from typing import TYPE_CHECKING

from moetuner.cost import Homes, Wire
from moetuner.problem import Objective

if TYPE_CHECKING:
    from moetuner.pipeline import PlanReport


def verdict(report: PlanReport) -> str:
    """Say what was gained on held-out data over contiguous blocks, or that nothing was.

    A gain is claimed only when the bootstrap interval leaves out zero.
    """
    result = report.result
    reason = _no_gain_possible(report)
    if reason:
        return reason
    if result is report.baseline:
        return "This is the contiguous baseline itself: nothing to gain by definition."
    if result.gain is None:
        return "The held-out part is a single sequence: no interval, no gain claimed."
    gain = result.gain
    percent = f"{abs(gain.gain):.1%}"
    interval = f"95% interval {gain.low:+.1%} to {gain.high:+.1%}"
    if not gain.certain:
        text = (
            f"No certain gain: {result.name} is {percent} "
            f"{'faster' if gain.gain >= 0 else 'slower'} than contiguous blocks in "
            f"modelled time on held-out data, but the {interval} includes zero."
        )
    elif gain.gain > 0:
        text = (
            f"{result.name} needs {percent} less modelled time than contiguous blocks "
            f"on held-out data ({interval})."
        )
    else:
        text = (
            f"{result.name} is WORSE than contiguous blocks by {percent} on held-out "
            f"data ({interval}): do not use it."
        )
    return " ".join([text, *_notes(report)])


def _no_gain_possible(report: PlanReport) -> str:
    if report.topology.num_ranks == 1:
        return "One rank: every placement is the same, there is nothing to gain."
    if report.result.placement.slots_per_rank == 1:
        return (
            "One expert per rank: without replicas a placement only renames ranks, so "
            "there is nothing to balance."
        )
    return ""


def _notes(report: PlanReport) -> list[str]:
    cost, topology = report.options.cost, report.topology
    notes = []
    best = min(report.candidates, key=lambda c: c.evaluation.modelled_seconds)
    if best.name != report.result.name:
        notes.append(f"The baseline {best.name} scored better still.")
    if cost.wire is Wire.ALLGATHER:
        notes.append(
            "With all-gather every row goes everywhere: all of it is load balance."
        )
    elif (
        cost.homes is Homes.UNIFORM
        and report.result.solution.objective
        in (Objective.LINK_TRAFFIC, Objective.TOTAL_TRAFFIC)
        and topology.num_nodes == 1
    ):
        notes.append(
            "With homes independent of routing and one node, aligning layers moves no "
            "row less: the gain is load balance."
        )
    return notes
