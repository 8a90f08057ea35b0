"""`moetuner drift`: whether the plan in use still fits what the model routes now."""

from __future__ import annotations

from pathlib import Path  # noqa: TC003 - typer reads annotations
from typing import TYPE_CHECKING, Annotated

import typer

from moetuner.cli.interrupts import keep_in_mind
from moetuner.cli.messages import note
from moetuner.cli.options import (
    MAX_SEED,
    CostOptions,
    Json,
    Quiet,
    Threads,
    TopK,
    TracePath,
    priced_words,
)
from moetuner.errors import InvalidPlacementError, InvalidProblemError

if TYPE_CHECKING:
    from moetuner.placement.model import Placement
    from moetuner.trace import CountTrace, Trace

REPLAN = 3
"""Exit code when re-planning pays."""


def drift(
    placement: Annotated[Path, typer.Argument(help="Placement file in use")],
    trace: TracePath,
    recording: Annotated[
        Path | None,
        typer.Option(help="Trace that it was planned on: what it cost there"),
    ] = None,
    threshold: Annotated[
        float, typer.Option(help="Share of a batch that a new plan must surely save")
    ] = 0.02,
    steps: Annotated[
        int, typer.Option(help="Batches in which moves must have paid", min=1)
    ] = 10_000,
    time_limit: Annotated[float, typer.Option(help="Seconds for the new plan")] = 60.0,
    seed: Annotated[
        int | None,
        typer.Option(
            help="Of split, solver, bootstrap  [default: 0; on its own recording the "
            "plan's]",
            min=0,
            max=MAX_SEED,
        ),
    ] = None,
    threads: Threads = 0,
    split: Annotated[
        float | None,
        typer.Option(
            help="Share of the new tokens to plan on; the rest scores  [default: 0.5; "
            "on its own recording the plan's]"
        ),
    ] = None,
    out: Annotated[
        Path | None, typer.Option(help="Placement file of the new plan to write")
    ] = None,
    *,
    cost: CostOptions,
    top_k: TopK = None,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Weigh the plan in use against a new one: exit 3 if re-planning pays, 0 if not.

    What no option says is priced as the placement was planned.
    """
    from moetuner.placement.file import read_placement, write_placement
    from moetuner.planning.drift import DriftOptions, measure_drift
    from moetuner.planning.provenance import part_of
    from moetuner.report.drift import drift_json, print_drift
    from moetuner.report.outputs import check_report
    from moetuner.report.progress import ProgressLine
    from moetuner.report.terminal import print_content, print_json, print_sentences
    from moetuner.solver import SolverOptions
    from moetuner.trace import read_trace

    inputs = [placement, trace, *([recording] if recording else [])]
    if out is not None:
        check_report(out, inputs)
    in_use, routing = read_placement(placement), read_trace(trace, top_k=top_k)
    own = None if recording is None else read_trace(recording, top_k=top_k)
    _check_models(placement, in_use, {trace: routing, recording: own})
    pricing = cost.pricing([routing], quiet, in_use)
    part = part_of(in_use, routing.sha256())
    for option, given, planned in zip(
        *(("--split", "--seed"), (split, seed), part or (split, seed)), strict=True
    ):
        if given is not None and given != planned:
            raise InvalidProblemError(
                f"{placement} was planned on this recording, with {option} {planned}:"
                f" with another one, tokens that it was planned on would score it. "
                f"Leave out {option} {given}, or give a new recording"
            )
    options = DriftOptions(
        threshold=threshold,
        steps=steps,
        pricing=pricing,
        plan_fraction=0.5 if split is None else split,
        solver_options=SolverOptions(
            time_limit=time_limit, seed=seed or 0, threads=threads
        ),
    )

    def keep(new: Placement) -> None:
        if out is not None:
            write_placement(new, out)
            keep_in_mind(f"interrupted while scoring; {out} holds the new plan")

    with ProgressLine() as line:
        found = measure_drift(
            *(in_use, routing, options),
            recording=own,
            progress=None if quiet else line.update,
            on_solved=keep,
        )
    if found.same_recording:
        note(
            f"{placement} was planned on this recording: no drift is to be seen in it; "
            f"scored on what was held out",
            quiet,
        )
    new = found.comparison.result.placement
    if new.provenance.status == "interrupted":
        note("interrupted: the new plan is the best found so far", quiet)
    if as_json:
        print_json(drift_json(found))
    else:
        print_sentences(priced_words(pricing, in_use, str(placement)))
        print_drift(found)
        if out is not None:
            print_content(f"wrote {out}")
    if found.pays:
        raise typer.Exit(REPLAN)


def _check_models(
    path: Path, in_use: Placement, traces: dict[Path | None, Trace | CountTrace | None]
) -> None:
    """Refuse traces of another model, by their names."""
    from moetuner.evaluation.tally import check_same_model

    for name, trace in traces.items():
        if trace is None:
            continue
        try:
            check_same_model(trace, in_use)
        except InvalidPlacementError as error:
            raise InvalidPlacementError(f"{path} and {name}: {error}") from error
