"""From a trace to a scored placement: plan on one part, score on the other."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from importlib import resources
from typing import TYPE_CHECKING

import numpy as np

from moetuner.cost import CostModel, Wire
from moetuner.errors import MissingStatisticsError
from moetuner.evaluate import (
    Evaluation,
    GainInterval,
    bootstrap_seconds,
    evaluate,
    gain_interval,
)
from moetuner.problem import Objective, PlacementProblem
from moetuner.solver import Solution, SolverOptions, get_solver
from moetuner.statistics import RoutingStatistics
from moetuner.trace import CountTrace, Trace, read_trace, split_by_sequence

if TYPE_CHECKING:
    from moetuner.placement import Placement
    from moetuner.solver import ProgressCallback
    from moetuner.topology import Topology

BASELINES = ("contiguous", "random", "lpt")


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
        Slots per rank and layer; 0 means just enough.
    equal_slots, memory_slack
        See `PlacementProblem`.
    plan_fraction
        Share of the tokens to plan on; the rest scores.
    """

    solver: str = "ilp2"
    solver_options: SolverOptions = field(default_factory=SolverOptions)
    cost: CostModel = field(default_factory=CostModel)
    slots_per_rank: int = 0
    equal_slots: bool = True
    memory_slack: int | None = None
    plan_fraction: float = 0.5


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Candidate:
    """One placement, how it came about, and its score on the held-out part."""

    name: str
    solution: Solution
    evaluation: Evaluation
    gain: GainInterval | None
    """Gain in modelled time over contiguous blocks; None for those themselves, or
    when the held-out part is a single sequence."""

    @property
    def placement(self) -> Placement:
        """The placement itself."""
        return self.solution.placement


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class PlanReport:
    """Baselines and the result, scored on tokens that none of them was planned on."""

    candidates: tuple[Candidate, ...]
    options: PlanOptions
    topology: Topology
    plan_tokens: int
    score_tokens: int

    @property
    def result(self) -> Candidate:
        """The placement of the solver that was asked for: the last candidate."""
        return self.candidates[-1]

    @property
    def baseline(self) -> Candidate:
        """Contiguous blocks: the first candidate."""
        return self.candidates[0]


def demo_trace() -> Trace:
    """The routing trace that ships with the package, of a real small model.

    Its model, training and recording are described in ``examples/train_demo_model``.
    """
    file = resources.files("moetuner") / "data" / "demo_trace.safetensors"
    with resources.as_file(file) as path:
        trace = read_trace(path)
    assert isinstance(trace, Trace)
    return trace


def plan_trace(
    trace: Trace | CountTrace,
    topology: Topology,
    options: PlanOptions = PlanOptions(),
    *,
    progress: ProgressCallback | None = None,
) -> PlanReport:
    """Split `trace`, solve on one part, score everything on the other.

    Raises
    ------
    InvalidTraceError
        When the trace cannot be split.
    MissingStatisticsError
        When the solver or the wire needs more than a count-only source has.
    """
    if isinstance(trace, CountTrace) and options.cost.wire is not Wire.ALLGATHER:
        raise MissingStatisticsError(
            f"plan: wire={options.cost.wire.value} needs the experts of each token; "
            f"this source only counted loads, so only wire=allgather can be scored"
        )
    solver = get_solver(options.solver)
    split = split_by_sequence(trace, options.plan_fraction, options.solver_options.seed)
    problem = PlacementProblem(
        statistics=RoutingStatistics.from_trace(split.plan, coactivation=False),
        topology=topology,
        objective=solver.objectives[0],
        slots_per_rank=options.slots_per_rank,
        equal_slots=options.equal_slots,
        memory_slack=options.memory_slack,
        hardware=options.cost.hardware,
        shape=options.cost.shape,
    )
    # The asked-for solver runs first: it may refuse, and nothing else is worth waiting.
    result = solver.solve(problem, options.solver_options, progress=progress)
    names = [
        name for name in BASELINES if name != options.solver or name == "contiguous"
    ]
    # Baselines keep to equal slots: that is how they are used.
    balance = replace(problem, objective=Objective.MAX_LOAD, equal_slots=True)
    solutions = [get_solver(n).solve(balance, options.solver_options) for n in names]
    sha256 = trace.sha256()
    times = [
        bootstrap_seconds(split.score, solution.placement, options.cost)
        for solution in (*solutions, result)
    ]
    candidates = tuple(
        Candidate(
            name=name,
            solution=_with_source(solution, trace, sha256, options),
            evaluation=evaluate(split.score, solution.placement, options.cost),
            gain=_gain(times[0], seconds) if i else None,
        )
        for i, (name, solution, seconds) in enumerate(
            zip((*names, options.solver), (*solutions, result), times, strict=True)
        )
    )
    return PlanReport(
        candidates=candidates,
        options=options,
        topology=topology,
        plan_tokens=_num_tokens(split.plan),
        score_tokens=_num_tokens(split.score),
    )


def _gain(
    baseline: np.typing.NDArray[np.float64], candidate: np.typing.NDArray[np.float64]
) -> GainInterval | None:
    if np.isnan(baseline).any():
        return None
    return gain_interval(baseline, candidate)


def _with_source(
    solution: Solution, trace: Trace | CountTrace, sha256: str, options: PlanOptions
) -> Solution:
    """The solution with model, trace and resolved options in its provenance."""
    provenance = replace(
        solution.placement.provenance,
        model=trace.metadata.model,
        trace_sha256=sha256,
        options={
            "solver": options.solver,
            "time_limit": options.solver_options.time_limit,
            "seed": options.solver_options.seed,
            "plan_fraction": options.plan_fraction,
            "equal_slots": options.equal_slots,
            "memory_slack": options.memory_slack,
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


def _num_tokens(trace: Trace | CountTrace) -> int:
    if isinstance(trace, CountTrace):
        return int(trace.num_tokens.sum())
    return trace.num_tokens
