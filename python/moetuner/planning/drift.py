"""Whether a plan in use still fits the traffic, and what a new one would bring."""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

from moetuner._checks import is_number, is_whole
from moetuner.errors import InvalidPlacementError, InvalidProblemError
from moetuner.evaluation.moving import fetch_seconds
from moetuner.evaluation.tally import check_same_model
from moetuner.placement.changes import changes
from moetuner.planning.baselines import IN_USE
from moetuner.planning.beside import Beside
from moetuner.planning.comparison import compare_placements
from moetuner.planning.options import PlanOptions, Pricing
from moetuner.planning.provenance import part_of, pricing_of
from moetuner.planning.recordings import split_recordings
from moetuner.planning.scores import score_placements
from moetuner.problem import Objective
from moetuner.solver import SolverOptions
from moetuner.solver.base import Clock
from moetuner.solver.joint.config import JointConfig

if TYPE_CHECKING:
    from collections.abc import Callable

    from moetuner.evaluation.evaluate import GainInterval
    from moetuner.placement.changes import Changes
    from moetuner.placement.model import Placement
    from moetuner.planning.scores import Comparison, Scored
    from moetuner.solver import ProgressCallback
    from moetuner.trace import CountTrace, Trace

NEW = "new plan"
"""What is weighed against `IN_USE`."""
_SOLVER = "joint"


@dataclass(frozen=True, kw_only=True, slots=True)
class DriftOptions:
    """When a new plan is worth its moves, and how it is made.

    Parameters
    ----------
    threshold
        Share of a batch that a new plan must save, its whole interval above it.
    steps
        Batches that a new plan would serve: its moves must have paid by then, and an
        expert moves only where that pays within them.
    pricing
        Machine, model, wire, homes and batches.
    plan_fraction
        Share of the new tokens to plan on; the rest scores.
    solver_options
        Time limit, seed and threads of the new plan; the limit is also for the
        baselines beside it and their scores.

    Raises
    ------
    InvalidProblemError
        When the threshold is not in [0, 1), or steps is not a whole number > 0.
    """

    threshold: float = 0.02
    steps: int = 10_000
    pricing: Pricing = field(default_factory=Pricing)
    plan_fraction: float = 0.5
    solver_options: SolverOptions = field(default_factory=SolverOptions)

    def __post_init__(self) -> None:
        if not is_number(self.threshold) or not 0 <= self.threshold < 1:
            raise InvalidProblemError(
                f"DriftOptions: threshold must be in [0, 1), got {self.threshold!r}"
            )
        if not is_whole(self.steps) or self.steps < 1:
            raise InvalidProblemError(
                f"DriftOptions: steps must be a whole number > 0, got {self.steps!r}"
            )


@dataclass(frozen=True, kw_only=True, slots=True)
class Before:
    """What the plan in use cost on the recording that it was made for."""

    batch_seconds: float
    """Modelled time of the mean batch."""
    batch_size: float | None = None
    """Tokens of the mean batch; None when the recording was not at hand."""
    gain: float | None = None
    """Over contiguous blocks; None when the recording was not at hand."""
    held_out: bool = False
    """Whether these tokens were not planned on."""


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Drift:
    """A plan in use beside a new one, on new tokens that neither was planned on."""

    comparison: Comparison
    """Gains are over the plan in use; the result is the new plan."""
    moved: Changes
    """From the plan in use to the new one."""
    move_seconds: float
    """See `moetuner.evaluation.moving.fetch_seconds`."""
    before: Before | None
    """None when nobody says what the plan cost on its own recording."""
    same_recording: bool
    """Whether the new tokens are of the recording that the plan was made for."""
    options: DriftOptions

    @property
    def in_use(self) -> Scored:
        """The plan in use."""
        return self.comparison.baseline

    @property
    def gain(self) -> GainInterval | None:
        """Of the new plan over the one in use; None when nothing tells its spread."""
        return None if self.comparison.in_sample else self.comparison.result.gain

    @property
    def saved_seconds(self) -> float:
        """Of the mean batch, by the new plan; negative when it is slower."""
        new = self.comparison.result.evaluation
        return self.in_use.evaluation.batch_seconds_mean - new.batch_seconds_mean

    @property
    def steps_to_pay(self) -> int | None:
        """Batches after which the moves have paid; None when they never do."""
        if not self.move_seconds:
            return 0
        steps = self.move_seconds / self.saved_seconds if self.saved_seconds > 0 else 0
        return math.ceil(steps) if steps and math.isfinite(steps) else None

    @property
    def clears_threshold(self) -> bool:
        """Whether the gain's whole interval lies above the threshold."""
        return self.gain is not None and bool(self.gain.low > self.options.threshold)

    @property
    def pays(self) -> bool:
        """Whether re-planning pays: gain beyond the threshold, moves paid in time."""
        steps = self.steps_to_pay
        return self.clears_threshold and steps is not None and steps <= self.steps

    @property
    def steps(self) -> int:
        """Batches that a new plan would serve."""
        return self.options.steps


def batch_size(scored: Scored) -> float:
    """Tokens of the mean batch that was scored."""
    return scored.evaluation.num_tokens / scored.evaluation.batch_seconds.size


def measure_drift(
    in_use: Placement,
    trace: Trace | CountTrace,
    options: DriftOptions = DriftOptions(),
    *,
    recording: Trace | CountTrace | None = None,
    progress: ProgressCallback | None = None,
    on_solved: Callable[[Placement], None] | None = None,
) -> Drift:
    """Weigh the plan in use against a new one that starts from it.

    The new plan is made on one part of the new trace. Both, and every quick baseline,
    are scored on the other part. On the very recording that the plan in use was made
    for, the parts are those of that plan.

    Parameters
    ----------
    in_use
        The placement in use.
    trace
        What the model routes now.
    options
        Thresholds, pricing, and how the new plan is made.
    recording
        What `in_use` was planned on, to say what it cost there on held-out tokens.
    progress
        Gets the news of the solver.
    on_solved
        Gets the new plan before it is scored, so that it can be kept.

    Raises
    ------
    InvalidPlacementError
        When `in_use` is of another model than a trace, or not of `recording`.
    InvalidProblemError, InvalidTraceError, MissingStatisticsError
        As `moetuner.planning.plan.plan_trace`.
    """
    check_same_model(trace, in_use)
    before = _before(in_use, options.pricing, recording)
    part = part_of(in_use, trace.sha256())
    asked = _plan_options(in_use, options, part)
    seed = asked.solver_options.seed
    recordings = split_recordings([trace], asked.plan_fraction, seed, asked.phase)
    beside = Beside.of(
        recordings,
        in_use.topology,
        asked,
        clock=Clock(time_limit=asked.solver_options.time_limit),
        progress=progress,
    )
    beside.solve_quick(asked.baselines)
    new = beside.solve().placement
    if on_solved is not None:
        on_solved(new)
    others = {name: each.placement for name, each in beside.solutions.items()}
    comparison = score_placements(
        recordings[0],
        {IN_USE: in_use, **others, NEW: new},
        options.pricing,
        result=NEW,
        seed=seed,
        left_out=beside.left_out,
        measured=beside.measured[0],
    )
    cost = options.pricing.cost
    moved = changes(in_use, new, cost.shape.expert_bytes)
    return Drift(
        comparison=comparison,
        moved=moved,
        move_seconds=fetch_seconds(moved, in_use, cost.hardware),
        before=before,
        same_recording=part is not None,
        options=options,
    )


def _plan_options(
    in_use: Placement, options: DriftOptions, part: tuple[float, int] | None
) -> PlanOptions:
    """A new plan from the one in use, in its slots."""
    pricing, topology = options.pricing, in_use.topology
    hardware, shape = pricing.cost.hardware, pricing.cost.shape
    link = hardware.inside.slowest
    if topology.num_nodes > 1:
        per_node = topology.ranks_per_node
        link = min(link, hardware.between(per_node).slowest / per_node)
    # Ranks fetch at the same time: one replica more is a G-th of that on each.
    each = shape.expert_bytes / link / topology.num_ranks
    fraction, solver_options = options.plan_fraction, options.solver_options
    if part is not None:
        fraction, seed = part
        solver_options = replace(solver_options, seed=seed)
    return PlanOptions(
        solver=_SOLVER,
        config=JointConfig(stay=in_use, move_seconds=each / options.steps),
        solver_options=solver_options,
        slots_per_rank=in_use.slots_per_rank,
        plan_fraction=fraction,
    ).priced_as(pricing)


def _before(
    in_use: Placement, pricing: Pricing, recording: Trace | CountTrace | None
) -> Before | None:
    """What the plan cost on its own recording: scored, or else as its solver said."""
    origin = in_use.provenance
    if recording is None:
        timed = origin.objective == Objective.MODELLED_TIME.value
        if origin.value is None or not timed or pricing_of(in_use) != pricing:
            return None
        return Before(batch_seconds=origin.value)
    if recording.sha256() not in (origin.trace_sha256, *origin.other_traces):
        raise InvalidPlacementError(
            "drift: the plan in use was not planned on the given recording: its file "
            f"names trace sha256 {origin.trace_sha256 or 'nothing'!s:.16}"
        )
    found = compare_placements(
        recording,
        {IN_USE: in_use},
        pricing.cost,
        batch_tokens=pricing.batch_tokens,
        batch_kind=pricing.batch_kind,
        phase=pricing.phase,
    )
    own = found.result
    gain = own.gain
    return Before(
        batch_seconds=own.evaluation.batch_seconds_mean,
        batch_size=batch_size(own),
        gain=None if gain is None else gain.gain,
        held_out=found.held_out,
    )
