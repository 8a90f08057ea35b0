"""From a trace to a scored placement: plan on one part, score on the other."""

from __future__ import annotations

from dataclasses import dataclass, replace
from importlib import resources
from typing import TYPE_CHECKING

import numpy as np

from moetuner.bounds import certify
from moetuner.cost import CostModel, Wire
from moetuner.errors import (
    InvalidProblemError,
    InvalidTraceError,
    MissingStatisticsError,
)
from moetuner.evaluation import (
    Evaluation,
    GainInterval,
    bootstrap_seconds,
    evaluate,
    gain_interval,
)
from moetuner.plan_options import PlanOptions
from moetuner.problem import Objective, PlacementProblem
from moetuner.solver import (
    ProgressEvent,
    Solution,
    Solver,
    Stage,
    get_solver,
)
from moetuner.solver.history import History
from moetuner.solver.joint import JointConfig, JointSolver
from moetuner.solver.profile import Favour
from moetuner.trace import CountTrace, Trace, read_trace, split_by_sequence
from moetuner.workload import (
    Workload,
)

if TYPE_CHECKING:
    from collections.abc import Callable

    from moetuner.placement import Placement, ProgressPoint
    from moetuner.solver import ProgressCallback
    from moetuner.topology import Topology

BASELINES = ("contiguous", "random", "lpt")


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
        """The placement of the solver that was asked for."""
        return next(c for c in self.candidates if c.name == self.options.solver)

    @property
    def baseline(self) -> Candidate:
        """Contiguous blocks: the first candidate."""
        return self.candidates[0]

    @property
    def held_out(self) -> bool:
        """Whether the result was scored on tokens that it was not planned on."""
        return True

    @property
    def cost(self) -> CostModel:
        """What the scores are priced with."""
        return self.options.cost


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
    on_solved: Callable[[Placement], None] | None = None,
) -> PlanReport:
    """Split `trace`, solve on one part, score everything on the other.

    `on_solved` gets the result's placement before the scoring begins, so that it can
    be kept whatever happens later.

    Raises
    ------
    InvalidProblemError
        When the topology or the options do not fit the trace's experts.
    InvalidTraceError
        When the trace cannot be split, or a part of it routes no token.
    MissingStatisticsError
        When the solver or the wire needs more than a count-only source has.
    """
    if isinstance(trace, CountTrace) and options.cost.wire is not Wire.ALLGATHER:
        raise MissingStatisticsError(
            f"plan: wire={options.cost.wire.value} needs the experts of each token; "
            f"this source only counted loads, so only wire=allgather can be scored"
        )
    if options.slots_per_rank > trace.num_experts:
        raise InvalidProblemError(
            f"plan: slots_per_rank must be 0..{trace.num_experts}, the number of "
            f"experts, got {options.slots_per_rank}"
        )
    solver = _solver_of(options)
    split = split_by_sequence(trace, options.plan_fraction, options.solver_options.seed)
    for name, part in (("planning", split.plan), ("held-out", split.score)):
        if not _num_choices(part):
            raise InvalidTraceError(
                f"plan: no token of the {name} part chose an expert (all padding); "
                f"record more, or change --split or --seed"
            )
    problem = PlacementProblem.from_workload(
        Workload(
            traces=(split.plan,),
            cost=options.cost,
            batch_tokens=options.batch_tokens,
            batch_kind=options.batch_kind,
        ),
        topology,
        objective=solver.objectives[0],
        slots_per_rank=options.slots_per_rank,
        equal_slots=options.equal_slots,
        memory_slack=options.memory_slack,
    )
    # Baselines keep to equal slots: that is how they are used.
    balance = replace(problem, objective=Objective.MAX_LOAD, equal_slots=True)
    # What cannot be scored (no recorded homes, say) shows before a long solve.
    blocks = get_solver(BASELINES[0]).solve(balance, options.solver_options)
    _score(split.score, blocks.placement, options)
    # Then the asked-for solver: it may refuse, and nothing else is worth waiting.
    history = History(forward=progress)
    result = solver.solve(problem, options.solver_options, progress=history)
    sha256 = trace.sha256()
    result = _with_source(result, trace, sha256, options, history.points())
    if on_solved is not None:
        on_solved(result.placement)
    result = _proven(problem, result, options, progress)
    simple = replace(
        options,
        solver=BASELINES[0],
        equal_slots=True,
        memory_slack=None,
        favour=Favour.TIME,
        stay=None,
    )
    solutions = {
        name: _with_source(
            get_solver(name).solve(balance, options.solver_options),
            trace,
            sha256,
            replace(simple, solver=name),
        )
        for name in BASELINES
        if name != options.solver
    }
    solutions[options.solver] = result
    order = dict.fromkeys((BASELINES[0], *solutions))  # the baseline of gains first
    times = {
        name: bootstrap_seconds(
            split.score,
            solutions[name].placement,
            options.cost,
            seed=options.solver_options.seed,
        )
        for name in order
    }
    candidates = tuple(
        Candidate(
            name=name,
            solution=solutions[name],
            evaluation=_score(split.score, solutions[name].placement, options),
            gain=None
            if name == BASELINES[0]
            else paired_gain(times[BASELINES[0]], seconds),
        )
        for name, seconds in times.items()
    )
    return PlanReport(
        candidates=candidates,
        options=options,
        topology=topology,
        plan_tokens=num_tokens(split.plan),
        score_tokens=num_tokens(split.score),
    )


def _solver_of(options: PlanOptions) -> Solver:
    if options.solver != "joint":
        return get_solver(options.solver)
    return JointSolver(
        config=JointConfig(
            favour=options.favour,
            stay=options.stay,
            move_seconds=options.move_seconds,
        )
    )


def _score(
    trace: Trace | CountTrace, placement: Placement, options: PlanOptions
) -> Evaluation:
    return evaluate(
        trace,
        placement,
        options.cost,
        batch_tokens=options.batch_tokens,
        batch_kind=options.batch_kind,
    )


def paired_gain(
    baseline: np.typing.NDArray[np.float64], candidate: np.typing.NDArray[np.float64]
) -> GainInterval | None:
    """The interval of paired bootstrap times, float64 [1 + samples] each.

    Draws in which no token was routed tell nothing; None when too few are left.
    """
    known = np.isfinite(baseline) & (baseline > 0)
    if not known[0] or known.sum() < 2:
        return None
    return gain_interval(baseline[known], candidate[known])


def _proven(
    problem: PlacementProblem,
    solution: Solution,
    options: PlanOptions,
    progress: ProgressCallback | None,
) -> Solution:
    """The solution with a lower bound, and how it was found as a last stage."""
    timed = problem.objective is Objective.MODELLED_TIME
    if not (timed and options.prove_seconds and solution.lower_bound is None):
        return solution

    def show(done: int, total: int, bound: float) -> None:
        if progress:
            progress(
                ProgressEvent(
                    solver="certify",
                    stage="certify",
                    done=done,
                    total=total,
                    incumbent=solution.value,
                    bound=bound,
                )
            )

    proof = certify(
        problem,
        solution.placement,
        time_limit=options.prove_seconds,
        threads=options.solver_options.threads,
        progress=show,
    )
    stage = Stage(
        name="lower bound",
        objective=problem.objective,
        value=solution.value,
        lower_bound=proof.lower_bound,
        status=solution.status,
        seconds=proof.seconds,
    )
    return replace(
        solution, lower_bound=proof.lower_bound, stages=(*solution.stages, stage)
    )


def _with_source(
    solution: Solution,
    trace: Trace | CountTrace,
    sha256: str,
    options: PlanOptions,
    progress: tuple[ProgressPoint, ...] = (),
) -> Solution:
    """The solution with model, trace, options and its course in its provenance."""
    provenance = replace(
        solution.placement.provenance,
        model=trace.metadata.model,
        trace_sha256=sha256,
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
            "favour": options.favour.value,
            "move_seconds": options.move_seconds,
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


def num_tokens(trace: Trace | CountTrace) -> int:
    """Tokens of a trace, or of all groups of a count-only source."""
    if isinstance(trace, CountTrace):
        return int(trace.num_tokens.sum())
    return trace.num_tokens


def _num_choices(trace: Trace | CountTrace) -> int:
    """(token, layer, expert) choices that are not padding."""
    if isinstance(trace, CountTrace):
        return int(trace.counts.sum())
    return int((trace.topk_ids >= 0).sum())
