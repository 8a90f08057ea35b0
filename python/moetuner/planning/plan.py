"""From a trace to a scored placement: plan on one part, score on the other."""

from __future__ import annotations

from dataclasses import replace
from importlib import resources
from typing import TYPE_CHECKING

from moetuner._core import Rows
from moetuner._words import amount
from moetuner.bounds import certify
from moetuner.errors import InvalidPlacementError, MissingStatisticsError
from moetuner.planning.baselines import (
    BASELINES,
    IN_USE,
    REFERENCE,
    Baselines,
    solver_of,
)
from moetuner.planning.beside import Beside
from moetuner.planning.options import PlanOptions
from moetuner.planning.provenance import with_source
from moetuner.planning.recordings import (
    score_overall,
    split_recordings,
)
from moetuner.planning.redundancy import check_slots
from moetuner.planning.refit import refit
from moetuner.planning.scores import score_placements
from moetuner.problem import Objective, PlacementProblem
from moetuner.solver import (
    ProgressEvent,
    Solution,
    SolveStatus,
    Stage,
)
from moetuner.solver.base import Clock
from moetuner.trace import CountTrace, Trace, read_trace

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from moetuner.placement.model import Placement
    from moetuner.placement.topology import Topology
    from moetuner.planning.scores import Comparison
    from moetuner.solver import ProgressCallback


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
    clock: Clock | None = None,
) -> Comparison:
    """Split `trace`, solve on one part, score everything on the other.

    With `others`, recordings of the same model, the plan is for all of them: each is
    split alike, and the objective counts them as ``options`` says. Candidates are
    scored on what is held out of `trace`, and in `Comparison.others` on each other
    one's.

    `on_solved` gets the result's placement before the scoring begins, so that it can
    be kept whatever happens later; with ``options.refit`` also the one of all tokens,
    when there is one.

    `clock` is one that runs already, of a whole command, say: its limit counts; by
    default the time limit begins now.

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
    clock = clock or Clock(time_limit=options.solver_options.time_limit)
    _check_asked((trace, *others), topology, options)
    seed = options.solver_options.seed
    beside = Beside.of(
        split_recordings((trace, *others), options.plan_fraction, seed, options.phase),
        topology,
        replace(options, slots_per_rank=_slots_asked(options), refit=False),
        clock=clock,
        progress=progress,
    )
    problem, recordings, of_part = beside.problem, beside.recordings, beside.options
    if options.stay is not None:
        _check_stay(problem, options.stay)
    # Baselines first: what cannot be scored shows before a long solve, and no plan
    # shall be slower than one of them.
    beside.score_in_use()
    beside.solve_quick(options.baselines)
    result = beside.solve(2 if options.baselines is Baselines.ALL else 1)
    if on_solved is not None:
        on_solved(result.placement)
    if options.baselines is Baselines.ALL:
        hurry = result.status is SolveStatus.INTERRUPTED
        beside.solve_slow(options.baselines, hurry=hurry)
        before, result = result, beside.improved(result)
        if on_solved is not None and result is not before:
            on_solved(result.placement)
    if result.status is not SolveStatus.INTERRUPTED:
        result = _proven(problem, result, options, progress)
    solutions = {
        name: with_source(
            solution, recordings, replace(of_part, solver=solver_of(name), config=None)
        )
        for name, solution in sorted(
            beside.solutions.items(), key=lambda item: BASELINES.index(item[0])
        )
    }
    solutions[options.solver] = result
    if options.solver == REFERENCE:  # gains are measured against the first
        solutions = {REFERENCE: result, **solutions}
    comparison = _score(beside, solutions)
    if not options.refit:
        return comparison
    whole = replace(of_part, refit=True)
    again = refit(*(comparison, (trace, *others), topology, whole), progress=progress)
    if again is not None and on_solved is not None:
        on_solved(again.placement)
    return replace(comparison, refit=again)


def _score(beside: Beside, solutions: Mapping[str, Solution]) -> Comparison:
    """Score all solutions on what is held out of each recording.

    Gains are measured against what is in use, or contiguous blocks.
    """
    options = beside.options
    placements = {name: each.placement for name, each in solutions.items()}
    if options.stay is not None:
        placements = {IN_USE: options.stay, **placements}
    first, *others = (
        score_placements(
            recording,
            placements,
            options.pricing,
            result=options.solver,
            seed=options.solver_options.seed,
            solutions=solutions,
            left_out=beside.left_out,
            measured=measured,
        )
        for recording, measured in zip(beside.recordings, beside.measured, strict=True)
    )
    if not others:
        return first
    overall = score_overall((first, *others), options)
    return replace(first, others=tuple(others), overall=overall)


def _check_asked(
    traces: Sequence[Trace | CountTrace], topology: Topology, options: PlanOptions
) -> None:
    """Refuse options that the traces, or the placement in use, cannot answer."""
    stay = options.stay
    # Ahead of its prices, which may be of its ranks alone.
    if stay is not None and stay.topology != topology:
        own = stay.topology
        raise InvalidPlacementError(
            f"plan: stay, the placement in use: it is for "
            f"{amount(own.num_ranks, 'rank')} in "
            f"nodes of {own.ranks_per_node}, wanted {topology.num_ranks} in nodes of "
            f"{topology.ranks_per_node}"
        )
    counted = any(isinstance(each, CountTrace) for each in traces)
    if counted and options.cost.wire.rules.rows is not Rows.TO_ALL:
        raise MissingStatisticsError(
            f"plan: wire={options.cost.wire.value} needs the experts of each token; "
            f"this source only counted loads, so only wire=allgather can be scored"
        )
    check_slots(traces[0].num_experts, topology.num_ranks, options.slots_per_rank)


def _slots_asked(options: PlanOptions) -> int:
    """What is asked for, else what a placement in use with replicas has; 0: least."""
    if not options.slots_per_rank and options.stay and options.stay.has_replicas:
        return options.stay.slots_per_rank
    return options.slots_per_rank


def _check_stay(problem: PlacementProblem, stay: Placement) -> None:
    try:
        problem.check(stay)
    except InvalidPlacementError as error:
        raise InvalidPlacementError(
            f"plan: stay, the placement in use: {error}"
        ) from error


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
    placement = solution.placement
    told = replace(placement.provenance, lower_bound=bound)
    return replace(
        solution,
        placement=replace(placement, provenance=told),
        lower_bound=bound,
        stages=(*solution.stages, stage),
    )
