"""A validated plan made anew, on all tokens."""

from __future__ import annotations

import dataclasses
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from moetuner.planning.beside import Beside
from moetuner.planning.recordings import split_recordings
from moetuner.solver import SolveStatus
from moetuner.solver.base import Clock

if TYPE_CHECKING:
    from collections.abc import Sequence

    from moetuner.placement.topology import Topology
    from moetuner.planning.options import PlanOptions
    from moetuner.planning.scores import Comparison
    from moetuner.solver import ProgressCallback, Solution
    from moetuner.trace import CountTrace, Trace


def refit(
    comparison: Comparison,
    traces: Sequence[Trace | CountTrace],
    topology: Topology,
    options: PlanOptions,
    *,
    progress: ProgressCallback | None = None,
) -> Solution | None:
    """The plan of all tokens that the same options make, with what validates them.

    It gets as much time for each token as the scored plan had, see `refit_seconds`:
    on twice the tokens the same time finds less.

    None where the scored plan was interrupted or is already of all tokens, or when
    this solve is interrupted: half a search is no better than a whole one on half of
    the tokens.

    Parameters
    ----------
    comparison
        The plan of one part, scored on the other.
    traces, topology, options
        As `moetuner.planning.plan.plan_trace` has them, slots resolved.
    progress
        Gets the news of the solver.
    """
    if comparison.in_sample or _interrupted(comparison.result.solution):
        return None
    seed = options.solver_options.seed
    beside = Beside.of(
        split_recordings(traces, 1.0, seed, options.phase),
        topology,
        options,
        clock=Clock(time_limit=refit_seconds(options)),
        progress=progress,
    )
    beside.solve_quick(options.baselines)  # no plan shall be slower than one of them
    found = beside.solve()
    if _interrupted(found):
        return None
    told = replace(found.placement.provenance, validation=validation_of(comparison))
    return replace(found, placement=replace(found.placement, provenance=told))


def refit_seconds(options: PlanOptions) -> float:
    """Time limit of the plan of all tokens."""
    return options.solver_options.time_limit / options.plan_fraction


def validation_of(comparison: Comparison) -> dict[str, Any]:
    """What the plan of one part did on the other, as plain values."""
    rival = comparison.rival
    return {
        "plan_tokens": comparison.plan_tokens,
        "score_tokens": comparison.score_tokens,
        "batch_seconds_mean": comparison.result.evaluation.batch_seconds_mean,
        "baseline": comparison.baseline.name,
        "gain": _plain(comparison.result.gain),
        "best_baseline": None if rival is None else rival.name,
        "gain_over_best": None if rival is None else _plain(rival.gain),
        "placement_sha256": comparison.result.placement.sha256(),
    }


def _interrupted(solution: Solution | None) -> bool:
    return solution is not None and solution.status is SolveStatus.INTERRUPTED


def _plain(value: Any) -> dict[str, float] | None:
    if value is None:
        return None
    return {name: float(part) for name, part in dataclasses.asdict(value).items()}
