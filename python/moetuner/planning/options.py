"""What a plan is asked for."""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from moetuner._checks import is_number, one_of
from moetuner._words import amount
from moetuner.errors import InvalidProblemError
from moetuner.evaluation.cost import CostModel
from moetuner.evaluation.workload import (
    DEFAULT_BATCH_TOKENS,
    BatchKind,
    check_batch_tokens,
)
from moetuner.planning.baselines import Baselines
from moetuner.solver import SolverOptions
from moetuner.trace.phases import Phase

if TYPE_CHECKING:
    from moetuner.placement.model import Placement


@dataclass(frozen=True, kw_only=True, slots=True)
class Pricing:
    """What placements are scored with.

    Parameters
    ----------
    cost
        Machine, model shape, wire, homes and replica rule.
    batch_tokens, batch_kind
        Batches, see `moetuner.evaluation.workload.Workload`.
    phase
        Tokens of this phase alone; all of them when None.
    """

    cost: CostModel = field(default_factory=CostModel)
    batch_tokens: int = DEFAULT_BATCH_TOKENS
    batch_kind: BatchKind = BatchKind.SEQUENCES
    phase: Phase | None = None

    def words(self) -> tuple[str, ...]:
        """Part by part, for people."""
        cost = self.cost
        speeds = ",".join(f"{speed:g}" for speed in cost.rank_speeds)
        speeds = speeds or ("of the hardware" if cost.hardware.other_ranks else "alike")
        return (
            f"wire {cost.wire.value}",
            f"homes {cost.homes.value}",
            f"hardware {cost.hardware.name}",
            f"rank speeds {speeds}",
            *([f"network {cost.hardware.network}"] if cost.hardware.network else ()),
            f"replica rule {cost.replica_rule.value}",
            cost.shape.words(),
            *([] if self.phase is None else [f"tokens of {self.phase.value}"]),
            f"batches of about {amount(self.batch_tokens, 'token')} "
            f"({self.batch_kind.value})"
            if self.batch_tokens
            else "all tokens as one batch",
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class PlanOptions:
    """What `plan_trace` is asked; the whole of it goes into the placement's file.

    Parameters
    ----------
    solver
        Name in `moetuner.solver.SOLVERS`.
    config
        The solver's own options, `moetuner.solver.joint.config.JointConfig` say; None
        means its defaults.
    solver_options
        Seed, threads, and the seconds for baselines, solver and scores together.
    cost
        Machine, model shape, wire, homes and replica rule that placements are scored
        with.
    slots_per_rank
        Slots per rank and layer; 0 means just enough, or those of the placement in
        use where that holds replicas.
    plan_fraction
        Share of the tokens to plan on; the rest scores. 1 holds nothing out.
    refit
        After scoring make the plan anew, on all tokens, with the same options and in
        ``time_limit / plan_fraction`` seconds: as many for each token.
    batch_tokens, batch_kind
        Batches that are planned for and scored, see
        `moetuner.evaluation.workload.Workload`.
    phase
        Plan for and score on the tokens of this phase alone; all when None. The trace
        is split first: plans for both phases are made on the same requests.
    weights, worst_case
        What several recordings count for, the first one first, or that the slowest
        alone counts, see `moetuner.evaluation.workload.Workload`.
    baselines
        What stands beside the result, see `moetuner.planning.baselines.Baselines`.
    prove_seconds
        Seconds more, for a lower bound of the modelled time, see
        `moetuner.bounds.certify`, where the solver minimises that and has no bound of
        its own; 0 leaves it out.

    Raises
    ------
    InvalidProblemError
        When the time limit is not finite, or the fraction not in (0, 1], or 1 where
        a plan is to be made anew.
    """

    solver: str = "joint"
    config: Any = None
    solver_options: SolverOptions = field(default_factory=SolverOptions)
    cost: CostModel = field(default_factory=CostModel)
    slots_per_rank: int = 0
    plan_fraction: float = 0.5
    refit: bool = False
    batch_tokens: int = DEFAULT_BATCH_TOKENS
    batch_kind: BatchKind = BatchKind.SEQUENCES
    phase: Phase | None = None
    weights: tuple[float, ...] = ()
    worst_case: bool = False
    baselines: Baselines = Baselines.QUICK
    prove_seconds: float = 0.0

    def __post_init__(self) -> None:
        check_batch_tokens("PlanOptions", self.batch_tokens)
        kind = one_of(BatchKind, self.batch_kind, "PlanOptions: batch_kind")
        object.__setattr__(self, "batch_kind", kind)
        if self.phase is not None:
            phase = one_of(Phase, self.phase, "PlanOptions: phase")
            object.__setattr__(self, "phase", phase)
        baselines = one_of(Baselines, self.baselines, "PlanOptions: baselines")
        object.__setattr__(self, "baselines", baselines)
        object.__setattr__(self, "weights", tuple(self.weights))
        if not is_number(self.prove_seconds) or not 0 <= self.prove_seconds < math.inf:
            raise InvalidProblemError(
                f"PlanOptions: prove_seconds must be >= 0 s, got {self.prove_seconds!r}"
            )
        if not math.isfinite(self.solver_options.time_limit):
            raise InvalidProblemError(
                f"PlanOptions: time_limit must be finite, got "
                f"{self.solver_options.time_limit}"
            )
        if not is_number(self.plan_fraction) or not 0 < self.plan_fraction <= 1:
            raise InvalidProblemError(
                f"PlanOptions: plan_fraction must be in (0, 1], got "
                f"{self.plan_fraction!r}"
            )
        if self.refit and self.plan_fraction == 1:
            raise InvalidProblemError(
                "PlanOptions: plan_fraction is 1, so refit has nothing to add; leave "
                "one of them out"
            )

    @property
    def pricing(self) -> Pricing:
        """What placements are scored with."""
        return Pricing(
            cost=self.cost,
            batch_tokens=self.batch_tokens,
            batch_kind=self.batch_kind,
            phase=self.phase,
        )

    def priced_as(self, pricing: Pricing) -> PlanOptions:
        """The same, scored with that: `pricing` of the result."""
        return replace(
            self,
            cost=pricing.cost,
            batch_tokens=pricing.batch_tokens,
            batch_kind=pricing.batch_kind,
            phase=pricing.phase,
        )

    @property
    def stay(self) -> Placement | None:
        """The placement in use that the solver starts from, where it was told one."""
        stay: Placement | None = getattr(self.config, "stay", None)
        return stay
