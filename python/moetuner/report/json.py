"""Plans as plain JSON values."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any

from moetuner.report.verdict import verdict

if TYPE_CHECKING:
    from moetuner.evaluation.evaluate import GainInterval
    from moetuner.planning.baselines import Rival
    from moetuner.planning.plan import Candidate, PlanReport
    from moetuner.planning.recordings import Domain, Overall


def plan_json(report: PlanReport) -> dict[str, Any]:
    """Everything that the table shows, with full precision."""
    return {
        "verdict": verdict(report),
        "solver": report.options.solver,
        "options": dict(report.result.placement.provenance.options),
        "trace_sha256": report.result.placement.provenance.trace_sha256,
        "num_ranks": report.topology.num_ranks,
        "ranks_per_node": report.topology.ranks_per_node,
        "plan_tokens": report.plan_tokens,
        "score_tokens": report.score_tokens,
        "placements": [_candidate(candidate) for candidate in report.candidates],
        "best_baseline": _plain(report.rival),
        "left_out": dict(report.left_out),
        "overall": _plain(report.overall),
        "request_homes": None
        if report.request_homes is None
        else report.request_homes.to_json(),
        "others": [_domain(domain) for domain in report.domains],
    }


def _domain(domain: Domain) -> dict[str, Any]:
    return {
        "name": domain.name,
        "trace_sha256": domain.trace_sha256,
        "plan_tokens": domain.plan_tokens,
        "score_tokens": domain.score_tokens,
        "gain": _plain(domain.gain),
        "best_baseline": _plain(domain.rival),
        "placements": [
            {"name": name, **evaluation.to_json()}
            for name, evaluation in domain.evaluations.items()
        ],
    }


def _candidate(candidate: Candidate) -> dict[str, Any]:
    solution = candidate.solution
    return {
        "name": candidate.name,
        **candidate.evaluation.to_json(),
        "gain": _plain(candidate.gain),
        "objective": solution.objective.value,
        "value": solution.value,
        "lower_bound": solution.lower_bound,
        "status": solution.status.value,
        "seconds": solution.seconds,
        "stages": [
            {**dataclasses.asdict(stage), "gap": stage.gap} for stage in solution.stages
        ],
    }


def _plain(value: GainInterval | Rival | Overall | None) -> dict[str, Any] | None:
    return None if value is None else dataclasses.asdict(value)
