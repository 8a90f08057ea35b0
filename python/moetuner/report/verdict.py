"""One honest sentence about what a placement is worth."""

from __future__ import annotations

from typing import TYPE_CHECKING

from moetuner.cost import Homes, Wire
from moetuner.problem import Objective

if TYPE_CHECKING:
    from moetuner.pipeline import PlanReport

_SAME = 1e-3  # relative differences in time that are not worth a word


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
            f"No gain to be had: {result.name} is {percent} "
            f"{'faster' if gain.gain >= 0 else 'slower'} than contiguous blocks in "
            f"modelled time on held-out data, but the {interval} does not leave out "
            f"zero."
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
        return "No gain to be had: on one rank every placement is the same."
    cost, topology = report.options.cost, report.topology
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


def _notes(report: PlanReport) -> list[str]:
    cost, topology = report.options.cost, report.topology
    notes = []
    best = min(report.candidates, key=lambda c: c.evaluation.modelled_seconds)
    seconds = report.result.evaluation.modelled_seconds
    if best.evaluation.modelled_seconds < seconds * (1 - _SAME):
        notes.append(f"The baseline {best.name} scored better still.")
    if cost.wire is Wire.ALLGATHER:
        notes.append(
            "With all-gather every row goes everywhere: no gain in traffic is to be "
            "had, only in load balance."
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
