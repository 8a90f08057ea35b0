"""What a placement's file says of how it came about."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from moetuner.planning.baselines import solver_of
from moetuner.solver.joint.profiles import Favour

if TYPE_CHECKING:
    from collections.abc import Sequence

    from moetuner.placement.model import ProgressPoint
    from moetuner.planning.options import PlanOptions
    from moetuner.solver import Solution


def baseline_options(options: PlanOptions, name: str) -> PlanOptions:
    """What a baseline was asked, beside a plan with `options`."""
    return replace(
        options,
        solver=solver_of(name),
        equal_slots=True,
        memory_slack=None,
        request_homes=None,
        favour=Favour.TIME,
        copy_weight=1.0,
        stay=None,
        move_seconds=0.0,
    )


def _known(options: PlanOptions) -> int | str | None:
    asked = options.request_homes
    if asked is None:
        return None
    return "all" if asked.known_tokens is None else asked.known_tokens


def with_source(
    solution: Solution,
    model: str,
    sha256s: Sequence[str],
    options: PlanOptions,
    progress: tuple[ProgressPoint, ...] = (),
) -> Solution:
    """The solution with model, traces, options and its course in its provenance."""
    provenance = replace(
        solution.placement.provenance,
        model=model,
        trace_sha256=sha256s[0],
        progress=progress,
        options={
            "solver": options.solver,
            "time_limit": options.solver_options.time_limit,
            "seed": options.solver_options.seed,
            "threads": options.solver_options.threads,
            "plan_fraction": options.plan_fraction,
            "slots_per_rank": solution.placement.slots_per_rank,
            "equal_slots": options.equal_slots,
            "memory_slack": options.memory_slack,
            "batch_tokens": options.batch_tokens,
            "batch_kind": options.batch_kind.value,
            "request_homes": _known(options),
            "favour": options.favour.value,
            "copy_weight": options.copy_weight,
            "move_seconds": options.move_seconds,
            "other_traces": list(sha256s[1:]),
            "weights": list(options.weights),
            "worst_case": options.worst_case,
            "wire": options.cost.wire.value,
            "homes": options.cost.homes.value,
            "hardware": options.cost.hardware.name,
            "hidden_size": options.cost.shape.hidden_size,
            "expert_hidden_size": options.cost.shape.expert_hidden_size,
        },
    )
    return replace(
        solution, placement=replace(solution.placement, provenance=provenance)
    )
