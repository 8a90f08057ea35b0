"""From a trace to a scored placement: plan on one part, score on the other."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from importlib import resources
from typing import TYPE_CHECKING

from moetuner.bounds import certify
from moetuner.errors import (
    InvalidPlacementError,
    InvalidProblemError,
    MissingStatisticsError,
)
from moetuner.evaluation.cost import CostModel, Wire
from moetuner.evaluation.evaluate import Evaluation, GainInterval, evaluate
from moetuner.planning.baselines import REFERENCE, Baselines, Rival, solve_baselines
from moetuner.planning.options import PlanOptions
from moetuner.planning.progress import History
from moetuner.planning.provenance import baseline_options, with_source
from moetuner.planning.recordings import (
    Domain,
    Overall,
    num_tokens,
    score_domain,
    score_overall,
    score_plans,
    split_all,
    workload_of,
)
from moetuner.planning.request_homes import ScoredHomes, check_sequences, score_homes
from moetuner.problem import Objective, PlacementProblem
from moetuner.solver import (
    ProgressEvent,
    Solution,
    Solver,
    SolveStatus,
    Stage,
    get_solver,
)
from moetuner.solver.joint.config import JointConfig
from moetuner.solver.programs.ilp1 import Ilp1Config
from moetuner.trace import CountTrace, Trace, read_trace

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from moetuner.placement.model import Placement
    from moetuner.placement.topology import Topology
    from moetuner.solver import ProgressCallback
    from moetuner.trace.split import Split


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
    rival: Rival | None = None
    """The best baseline on the held-out part of the first recording."""
    left_out: Mapping[str, str] = field(default_factory=dict)
    """Baselines that cannot answer this problem, and why."""
    domains: tuple[Domain, ...] = ()
    """Every recording after the first."""
    overall: Overall | None = None
    """All recordings together, where there are several."""
    request_homes: ScoredHomes | None = None
    """Of the result on the first recording, where it was asked for."""

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
    traces = (trace, *others)
    _check_asked(traces, options)
    if options.stay is not None and options.stay.has_replicas:
        slots = options.slots_per_rank or options.stay.slots_per_rank
        options = replace(options, slots_per_rank=slots)
    solver = _solver_of(options)
    splits = split_all(traces, options)
    problem = PlacementProblem.from_workload(
        workload_of(splits, options),
        topology,
        objective=solver.objectives[0],
        slots_per_rank=options.slots_per_rank,
    )
    if options.stay is not None:
        _check_stay(problem, options.stay)
    # What cannot be scored (no recorded homes, say) shows before a long solve.
    blocks = solve_baselines(problem, Baselines.NONE, options.solver_options)
    for each in splits:
        evaluate(each.score, blocks.solutions[REFERENCE].placement, options.cost)
    # Then the asked-for solver: it may refuse, and nothing else is worth waiting.
    model, sha256s = trace.metadata.model, [each.sha256() for each in traces]
    history = History(forward=progress)
    result = solver.solve(problem, options.solver_options, progress=history)
    result = with_source(result, model, sha256s, options, history.points())
    if on_solved is not None:
        on_solved(result.placement)
    interrupted = result.status is SolveStatus.INTERRUPTED
    result = _proven(problem, result, options, progress)
    baselines = solve_baselines(
        problem,
        options.baselines,
        options.solver_options,
        skip=options.solver,
        hurry=interrupted,
    )
    solutions = {
        name: with_source(solution, model, sha256s, baseline_options(options, name))
        for name, solution in baselines.solutions.items()
    }
    solutions[options.solver] = result
    if options.solver == REFERENCE:  # gains are measured against the first
        solutions = {REFERENCE: result, **solutions}
    return _report(traces, splits, solutions, baselines.left_out, topology, options)


def _report(
    traces: Sequence[Trace | CountTrace],
    splits: Sequence[Split],
    solutions: Mapping[str, Solution],
    left_out: Mapping[str, str],
    topology: Topology,
    options: PlanOptions,
) -> PlanReport:
    """Score all solutions on what is held out of each trace."""
    split = splits[0]
    placements = {name: each.placement for name, each in solutions.items()}
    scores = score_plans(split, placements, options)
    candidates = tuple(
        Candidate(
            name=name,
            solution=solution,
            evaluation=scores.evaluations[name],
            gain=scores.gains[name],
        )
        for name, solution in solutions.items()
    )
    domains = tuple(
        score_domain(number, each, part, placements, options)
        for number, (each, part) in enumerate(
            zip(traces[1:], splits[1:], strict=True), start=2
        )
    )
    parts = [scores.evaluations, *(domain.evaluations for domain in domains)]
    return PlanReport(
        candidates=candidates,
        options=options,
        topology=topology,
        plan_tokens=num_tokens(split.plan),
        score_tokens=num_tokens(split.score),
        rival=scores.rival,
        left_out=left_out,
        domains=domains,
        overall=score_overall(parts, options) if domains else None,
        request_homes=_score_homes(split.score, placements[options.solver], options),
    )


def _check_asked(traces: Sequence[Trace | CountTrace], options: PlanOptions) -> None:
    """Refuse options that the traces cannot answer."""
    trace = traces[0]
    counted = any(isinstance(each, CountTrace) for each in traces)
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
    if options.request_homes is not None:
        check_sequences(trace, options.batch_kind)


def _score_homes(
    trace: Trace | CountTrace, placement: Placement, options: PlanOptions
) -> ScoredHomes | None:
    if options.request_homes is None:
        return None
    return score_homes(
        trace,
        placement,
        options.cost,
        options.request_homes,
        batch_tokens=options.batch_tokens,
    )


def _check_stay(problem: PlacementProblem, stay: Placement) -> None:
    try:
        problem.check(stay)
    except InvalidPlacementError as error:
        raise InvalidPlacementError(
            f"plan: stay (--from), the placement in use: {error}"
        ) from error


def _solver_of(options: PlanOptions) -> Solver:
    config: object = None
    if options.solver == "joint":
        config = JointConfig(
            favour=options.favour,
            copy_weight=options.copy_weight,
            stay=options.stay,
            move_seconds=options.move_seconds,
        )
    elif options.solver == "ilp1":
        config = Ilp1Config(
            free_sizes=not options.equal_slots, memory_slack=options.memory_slack
        )
    return get_solver(options.solver, config)


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
