"""Comparisons as plain JSON values."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any

from moetuner.report.changes import changes_in, seconds_to_move
from moetuner.report.verdict import verdict

if TYPE_CHECKING:
    from moetuner.evaluation.evaluate import GainInterval
    from moetuner.planning.baselines import Rival
    from moetuner.planning.recordings import Overall
    from moetuner.planning.scores import Comparison, Scored
    from moetuner.solver import Solution


def comparison_json(report: Comparison) -> dict[str, Any]:
    """Everything that the table shows, with full precision."""
    origin = report.result.placement.provenance
    return {
        "verdict": verdict(report),
        "solver": origin.solver,
        "options": dict(origin.options),
        "trace_sha256": report.trace_sha256,
        "num_ranks": report.topology.num_ranks,
        "ranks_per_node": report.topology.ranks_per_node,
        "plan_tokens": report.plan_tokens,
        "score_tokens": report.score_tokens,
        "held_out": report.held_out,
        "placements": [_scored(each) for each in report.candidates],
        "best_baseline": _plain(report.rival),
        "moves": _moves(report),
        "left_out": dict(report.left_out),
        "refit": None if report.refit is None else _refit(report.refit),
        "overall": _plain(report.overall),
        "others": [_other(each) for each in report.others],
    }


def _moves(report: Comparison) -> dict[str, Any]:
    """What the result moves from the placement that gains are measured against."""
    moved = changes_in(report)
    return {
        "from": report.baseline.name,
        "experts_moved": moved.num_moved,
        "experts": moved.num_replicas,
        "bytes": moved.bytes_moved,
        "bytes_between_nodes": int(moved.between_nodes.sum()) * moved.expert_bytes,
        "seconds_at_least": seconds_to_move(report, moved),
    }


def _refit(solution: Solution) -> dict[str, Any]:
    placement = solution.placement
    return {
        **_claims(solution),
        "placement_sha256": placement.sha256(),
        "validation": dict(placement.provenance.validation),
    }


def _other(report: Comparison) -> dict[str, Any]:
    return {
        "name": report.name,
        "trace_sha256": report.trace_sha256,
        "plan_tokens": report.plan_tokens,
        "score_tokens": report.score_tokens,
        "gain": _plain(report.result.gain),
        "best_baseline": _plain(report.rival),
        "placements": [
            {"name": each.name, **each.evaluation.to_json()}
            for each in report.candidates
        ],
    }


def _scored(scored: Scored) -> dict[str, Any]:
    found = {
        "name": scored.name,
        **scored.evaluation.to_json(),
        "gain": _plain(scored.gain),
    }
    return found if scored.solution is None else {**found, **_claims(scored.solution)}


def _claims(solution: Solution) -> dict[str, Any]:
    return {
        "objective": solution.objective.value,
        "value": solution.value,
        "lower_bound": solution.lower_bound,
        "gap": solution.gap,
        "status": solution.status.value,
        "seconds": solution.seconds,
        "stages": [
            {**dataclasses.asdict(stage), "gap": stage.gap} for stage in solution.stages
        ],
    }


def _plain(value: GainInterval | Rival | Overall | None) -> dict[str, Any] | None:
    return None if value is None else dataclasses.asdict(value)
