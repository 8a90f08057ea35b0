"""What a plan is asked for."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from moetuner._checks import is_number, one_of
from moetuner.errors import InvalidProblemError
from moetuner.evaluation.cost import CostModel
from moetuner.evaluation.workload import (
    DEFAULT_BATCH_TOKENS,
    BatchKind,
    check_batch_tokens,
)
from moetuner.planning.baselines import Baselines
from moetuner.solver import SolverOptions
from moetuner.solver.joint.profiles import Favour

if TYPE_CHECKING:
    from moetuner.placement.model import Placement
    from moetuner.planning.request_homes import RequestHomes


@dataclass(frozen=True, kw_only=True, slots=True)
class PlanOptions:
    """What `plan_trace` is asked.

    Parameters
    ----------
    solver
        Name in `moetuner.solver.SOLVERS`.
    solver_options
        Time limit, seed, threads.
    cost
        Machine, model shape, wire and homes that placements are scored with.
    slots_per_rank
        Slots per rank and layer; 0 means just enough, or those of ``stay`` where that
        holds replicas.
    equal_slots, memory_slack
        Of the solver ``ilp1`` alone, see `moetuner.solver.programs.ilp1.Ilp1Config`.
    plan_fraction
        Share of the tokens to plan on; the rest scores.
    batch_tokens, batch_kind
        Batches that are planned for and scored, see
        `moetuner.evaluation.workload.Workload`.
    weights, worst_case
        What several recordings count for, the first one first, or that the slowest
        alone counts, see `moetuner.evaluation.workload.Workload`.
    baselines
        What stands beside the result, see `moetuner.planning.baselines.Baselines`.
    request_homes
        A second stage that gives each sequence of the first recording a rank, scored
        apart; see `moetuner.planning.request_homes`.
    favour, copy_weight, stay, move_seconds
        Of the solver ``joint`` alone, see `moetuner.solver.joint.solver.JointConfig`.
    prove_seconds
        For a lower bound of the modelled time, see `moetuner.bounds.certify`, where the
        solver minimises that and has no bound of its own; 0 leaves it out.

    Raises
    ------
    InvalidProblemError
        When the time limit is not finite, the fraction not in (0, 1), or
        ``memory_slack`` is given for equal slots.
    """

    solver: str = "joint"
    solver_options: SolverOptions = field(default_factory=SolverOptions)
    cost: CostModel = field(default_factory=CostModel)
    slots_per_rank: int = 0
    equal_slots: bool = True
    memory_slack: int | None = None
    plan_fraction: float = 0.5
    batch_tokens: int = DEFAULT_BATCH_TOKENS
    batch_kind: BatchKind = BatchKind.SEQUENCES
    weights: tuple[float, ...] = ()
    worst_case: bool = False
    baselines: Baselines = Baselines.QUICK
    request_homes: RequestHomes | None = None
    favour: Favour = Favour.TIME
    copy_weight: float = 1.0
    stay: Placement | None = None
    move_seconds: float = 0.0
    prove_seconds: float = 0.0

    def __post_init__(self) -> None:
        check_batch_tokens("PlanOptions", self.batch_tokens)
        kind = one_of(BatchKind, self.batch_kind, "PlanOptions: batch_kind")
        object.__setattr__(self, "batch_kind", kind)
        baselines = one_of(Baselines, self.baselines, "PlanOptions: baselines")
        object.__setattr__(self, "baselines", baselines)
        favour = one_of(Favour, self.favour, "PlanOptions: favour")
        object.__setattr__(self, "favour", favour)
        if self.solver != "joint" and (self.stay or favour is not Favour.TIME):
            raise InvalidProblemError(
                f"PlanOptions: favour and stay are for the solver joint, got "
                f"{self.solver}"
            )
        if self.copy_weight != 1 and favour is not Favour.COPIES:
            raise InvalidProblemError(
                f"PlanOptions: copy_weight is for favour=copies, got {favour.value}"
            )
        if not is_number(self.move_seconds) or not 0 <= self.move_seconds < math.inf:
            raise InvalidProblemError(
                f"PlanOptions: move_seconds must be >= 0 s, got {self.move_seconds!r}"
            )
        if not is_number(self.prove_seconds) or not 0 <= self.prove_seconds < math.inf:
            raise InvalidProblemError(
                f"PlanOptions: prove_seconds must be >= 0 s, got {self.prove_seconds!r}"
            )
        if not math.isfinite(self.solver_options.time_limit):
            raise InvalidProblemError(
                f"PlanOptions: time_limit must be finite, got "
                f"{self.solver_options.time_limit}"
            )
        if not self.equal_slots and self.solver != "ilp1":
            raise InvalidProblemError(
                f"PlanOptions: equal_slots=False (--free-sizes) is for the solver "
                f"ilp1, got {self.solver}"
            )
        if self.memory_slack is not None and self.equal_slots:
            raise InvalidProblemError(
                "PlanOptions: memory_slack is about free cluster sizes; it needs "
                "equal_slots=False (--free-sizes)"
            )
        if not 0 < self.plan_fraction < 1:
            raise InvalidProblemError(
                f"PlanOptions: plan_fraction must be in (0, 1), got "
                f"{self.plan_fraction}"
            )
