"""From a trace to a scored placement: plan on one part, score on the other."""

from __future__ import annotations

from dataclasses import dataclass, replace
from importlib import resources
from typing import TYPE_CHECKING

import numpy as np

from moetuner.bounds import certify
from moetuner.cost import CostModel, Wire
from moetuner.domains import Domain, num_tokens, score_domain, split_all, workload_of
from moetuner.errors import (
    InvalidPlacementError,
    InvalidProblemError,
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
    SolveStatus,
    Stage,
    get_solver,
)
from moetuner.solver.history import History
from moetuner.solver.joint import JointConfig, JointSolver
from moetuner.solver.profile import Favour
from moetuner.trace import CountTrace, Trace, read_trace

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

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
    """Of the first recording, as are the scored ones."""
    score_tokens: int
    domains: tuple[Domain, ...] = ()
    """Every recording after the first."""

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
    others: Sequence[Trace | CountTrace] = (),
    progress: ProgressCallback | None = None,
    on_solved: Callable[[Placement], None] | None = None,
) -> PlanReport:
    """Split `trace`, solve on one part, score everything on the other.

    With `others`, recordings of the same model, the plan is for all of them: each is
    split alike, and the objective counts them as ``options`` says. Candidates are
    scored on what is held out of `trace`, and `PlanReport.domains` on each other one's.

    `on_solved` gets the result's placement before the scoring begins, so that it can
    be kept whatever happens later.

    Raises
    ------
    InvalidPlacementError
        When the placement in use does not answer the problem.
    InvalidProblemError
        When the topology or the options do not fit the trace's experts.
    InvalidTraceError
        When the trace cannot be split, or a part of it routes no token.
    MissingStatisticsError
        When the solver or the wire needs more than a count-only source has.
    """
    counted = any(isinstance(each, CountTrace) for each in (trace, *others))
    if counted and options.cost.wire is not Wire.ALLGATHER:
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
    traces = (trace, *others)
    splits = split_all(traces, options)
    split = splits[0]
    problem = PlacementProblem.from_workload(
        workload_of(splits, options),
        topology,
        objective=solver.objectives[0],
        slots_per_rank=options.slots_per_rank,
        equal_slots=options.equal_slots,
        memory_slack=options.memory_slack,
    )
    if options.stay is not None:
        _check_stay(problem, options.stay)
    # Baselines keep to equal slots: that is how they are used.
    balance = replace(problem, objective=Objective.MAX_LOAD, equal_slots=True)
    # What cannot be scored (no recorded homes, say) shows before a long solve.
    blocks = get_solver(BASELINES[0]).solve(balance, options.solver_options)
    for each in splits:
        _score(each.score, blocks.placement, options)
    # Then the asked-for solver: it may refuse, and nothing else is worth waiting.
    history = History(forward=progress)
    result = solver.solve(problem, options.solver_options, progress=history)
    sha256 = trace.sha256()
    result = _with_source(result, trace, sha256, options, history.points(), others)
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
            others=others,
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
    placements = {each.name: each.placement for each in candidates}
    return PlanReport(
        candidates=candidates,
        options=options,
        topology=topology,
        plan_tokens=num_tokens(split.plan),
        score_tokens=num_tokens(split.score),
        domains=tuple(
            score_domain(number, each, part, placements, options)
            for number, (each, part) in enumerate(
                zip(others, splits[1:], strict=True), start=2
            )
        ),
    )


def _check_stay(problem: PlacementProblem, stay: Placement) -> None:
    try:
        problem.check(stay)
    except InvalidPlacementError as error:
        raise InvalidPlacementError(
            f"plan: stay (--from), the placement in use: {error}"
        ) from error


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
    proven = solution.status is SolveStatus.OPTIMAL
    if not timed or not options.prove_seconds or proven:
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
    bound = max(proof.lower_bound, solution.lower_bound or 0.0)
    stage = Stage(
        name="lower bound",
        objective=problem.objective,
        value=solution.value,
        lower_bound=bound,
        status=solution.status,
        seconds=proof.seconds,
    )
    return replace(solution, lower_bound=bound, stages=(*solution.stages, stage))


def _with_source(
    solution: Solution,
    trace: Trace | CountTrace,
    sha256: str,
    options: PlanOptions,
    progress: tuple[ProgressPoint, ...] = (),
    others: Sequence[Trace | CountTrace] = (),
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
            "other_traces": [each.sha256() for each in others],
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
