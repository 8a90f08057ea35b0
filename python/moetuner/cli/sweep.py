"""`moetuner sweep`: how many GPUs, how many spare slots, which machine."""

from __future__ import annotations

from contextlib import suppress
from dataclasses import replace
from pathlib import Path  # noqa: TC003 - typer reads annotations
from typing import TYPE_CHECKING, Annotated

import typer

from moetuner._words import amount, verb
from moetuner.cli.messages import as_typed, fail, note
from moetuner.cli.options import (
    CostOptions,
    Json,
    Quiet,
    Seed,
    SolverName,
    Threads,
    TopK,
    TracePath,
)
from moetuner.errors import InvalidProblemError, MissingDependencyError
from moetuner.solver import SOLVERS

if TYPE_CHECKING:
    from collections.abc import Sequence

    from moetuner.evaluation.hardware import Hardware
    from moetuner.planning.sweep import Cell, Setup, Sweep
    from moetuner.trace import CountTrace, Trace

_TYPED = ("--ranks", "--ranks-per-node", "--redundant", "--slots-per-rank", "--memory")


def sweep(
    trace: TracePath,
    *,
    ranks: Annotated[str, typer.Option(help="GPUs to try: 8,16,32")],
    ranks_per_node: Annotated[
        int, typer.Option(help="0: as many as the hardware joins, or all", min=0)
    ] = 0,
    redundant: Annotated[
        str, typer.Option(help="Spare slots to try, all GPUs together: 0,16,32")
    ] = "0",
    slots_per_rank: Annotated[
        str, typer.Option(help="Instead: slots of each GPU to try: 8,9")
    ] = "",
    tokens_per_gpu: Annotated[
        int,
        typer.Option(help="A batch has so many for each GPU; 0: --batch-tokens", min=0),
    ] = 0,
    memory: Annotated[
        float | None, typer.Option(help="GB of expert weights that fit into a GPU")
    ] = None,
    solver: Annotated[
        SolverName, typer.Option(metavar="<name>", help=", ".join(SOLVERS))
    ] = SolverName["joint"],
    time_limit: Annotated[float, typer.Option(help="Seconds for each cell")] = 20.0,
    seed: Seed = 0,
    threads: Threads = 0,
    split: Annotated[
        float, typer.Option(help="Share of tokens to plan on; the rest scores")
    ] = 0.5,
    csv: Annotated[Path | None, typer.Option(help="CSV file to write")] = None,
    plot: Annotated[
        Path | None, typer.Option(help="Plot to write: .svg, .png or .pdf")
    ] = None,
    placements: Annotated[
        Path | None, typer.Option(help="Folder for the placement file of each cell")
    ] = None,
    cost: CostOptions,
    top_k: TopK = None,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Plan for several numbers of GPUs, spare slots and machines; tell the best.

    --hardware takes several names or files between commas.
    """
    from moetuner.placement.file import write_placement
    from moetuner.planning.options import PlanOptions
    from moetuner.planning.sweep import sweep as plan_cells
    from moetuner.report.progress import ProgressLine
    from moetuner.report.sweep import write_csv, write_plot
    from moetuner.solver import SolverOptions
    from moetuner.trace import read_trace

    _check_outputs(trace, csv, plot, placements)
    if slots_per_rank and redundant != "0":
        raise InvalidProblemError("--redundant and --slots-per-rank: give one of them")
    if tokens_per_gpu and cost.batch_tokens is not None:
        raise InvalidProblemError("--tokens-per-gpu and --batch-tokens: give one")
    sizes = _numbers("--ranks", ranks)
    spare = [("redundant", n) for n in _numbers("--redundant", redundant, least=0)]
    if slots_per_rank:
        named = _numbers("--slots-per-rank", slots_per_rank)
        spare = [("slots_per_rank", n) for n in named]
    routing = read_trace(trace, top_k=top_k)
    setups = _setups(routing, sizes, spare, ranks_per_node, tokens_per_gpu, cost, quiet)
    if memory is not None and not memory > 0:
        raise InvalidProblemError(f"--memory must be > 0 GB, got {memory:g}")
    limit = None if memory is None else memory * 1e9
    note(_what_it_takes(routing, setups, limit, time_limit), quiet)
    options = PlanOptions(
        solver=solver.value,
        solver_options=SolverOptions(time_limit=time_limit, seed=seed, threads=threads),
        plan_fraction=split,
    )

    def keep(cell: Cell) -> None:
        if placements is not None and cell.comparison is not None:
            write_placement(cell.placement, placements / _file_name(cell))

    with ProgressLine() as line:
        found = plan_cells(
            *(routing, setups, options),
            memory=limit,
            progress=None if quiet else line.update,
            on_cell=keep,
        )
    if csv is not None:
        write_csv(found, csv)
    if plot is not None and found.planned:
        write_plot(found, plot)
    _show(found, as_json, [path for path in (csv, plot, placements) if path])
    if found.interrupted:
        done = len(found.planned)
        fail(
            f"interrupted: {done} of {amount(len(found.cells), 'cell')} "
            f"{verb(done, 'was', 'were')} planned",
            130,
        )


def _show(found: Sweep, as_json: bool, written: Sequence[Path]) -> None:
    from moetuner.report.sweep import (
        LEGEND,
        best_lines,
        cell_name,
        lost_lines,
        not_planned,
        sweep_json,
        sweep_table,
    )
    from moetuner.report.terminal import print_content, print_json, print_sentences

    if as_json:
        print_json(sweep_json(found))
        return
    print_content(sweep_table(found))
    print_content(LEGEND)
    for reason, cells in not_planned(found).items():
        names = "; ".join(cell_name(cell.setup) for cell in cells)
        if len(cells) > 2:
            sizes = sorted({cell.setup.num_ranks for cell in cells})
            names = f"{len(cells)} cells of {', '.join(map(str, sizes))} GPUs"
        print_sentences(f"not planned: {as_typed(reason, _TYPED)} ({names})")
    for line in (*lost_lines(found), *best_lines(found)):
        print_sentences(line)
    for path in written:
        print_content(f"wrote {path}")


def _setups(
    routing: Trace | CountTrace,
    sizes: Sequence[int],
    spare: Sequence[tuple[str, int]],
    ranks_per_node: int,
    tokens_per_gpu: int,
    cost: CostOptions,
    quiet: bool,
) -> list[Setup]:
    """Every machine with every number of GPUs and of spare slots."""
    from moetuner.planning.sweep import Setup

    setups = []
    names = [name.strip() for name in (cost.hardware or "").split(",")]
    if cost.hardware and not all(names):
        raise InvalidProblemError(
            f"--hardware: wanted names or files between commas, got {cost.hardware!r}"
        )
    named = [replace(cost, hardware=name or None) for name in names]
    first = named[0].pricing([routing], quiet)  # says what it assumes, once
    machines = [one.machine(first.cost.hardware) for one in named]
    for machine in _told_apart(machines):
        pricing = replace(first, cost=replace(first.cost, hardware=machine))
        for size in sizes:
            tokens = tokens_per_gpu * size or pricing.batch_tokens
            setups += [
                Setup(
                    num_ranks=size,
                    ranks_per_node=ranks_per_node,
                    pricing=replace(pricing, batch_tokens=tokens),
                    **{name: count},
                )
                for name, count in spare
            ]
    return setups


def _told_apart(machines: Sequence[Hardware]) -> list[Hardware]:
    """Each once; refuses two of one name, which tables and files would mix up."""
    found: dict[str, Hardware] = {}
    for machine in machines:
        other = found.setdefault(_in_file_names(machine), machine)
        if other != machine:
            raise InvalidProblemError(
                f"--hardware: {other.name} and {machine.name} are two machines of one "
                f"name; give one of them another name in its file"
            )
    return list(found.values())


def _what_it_takes(
    routing: Trace | CountTrace,
    setups: Sequence[Setup],
    memory: float | None,
    time_limit: float,
) -> str:
    """Said beforehand: a sweep may take an hour."""
    planned = 0
    for setup in setups:
        with suppress(InvalidProblemError):
            setup.check(routing, memory)
            planned += 1
    return (
        f"{planned} of {amount(len(setups), 'cell')} can be planned, in up to "
        f"{time_limit:g} s each: {_duration(planned * time_limit)} in all"
    )


def _numbers(option: str, text: str, least: int = 1) -> list[int]:
    """Whole numbers between commas, each once, in the order of their size."""
    parts = [part.strip() for part in text.split(",")]
    if not all(part.isascii() and part.isdecimal() for part in parts):
        raise InvalidProblemError(
            f"{option} must be whole numbers between commas, got {text!r}"
        )
    numbers = sorted({int(part) for part in parts})
    if numbers[0] < least:
        raise InvalidProblemError(f"{option} must be >= {least}, got {numbers[0]}")
    return numbers


def _file_name(cell: Cell) -> str:
    machine = _in_file_names(cell.setup.pricing.cost.hardware)
    return f"{machine}-{cell.setup.num_ranks}x{cell.placement.slots_per_rank}.json"


def _in_file_names(machine: Hardware) -> str:
    return "".join(each if each.isalnum() else "-" for each in machine.name)


def _duration(seconds: float) -> str:
    return f"{seconds:.0f} s" if seconds < 120 else f"{seconds / 60:.0f} min"


def _check_outputs(
    trace: Path, csv: Path | None, plot: Path | None, placements: Path | None
) -> None:
    from moetuner.report.outputs import can_plot, check_report
    from moetuner.report.sweep import SUFFIXES

    for path in (csv, plot):
        if path is not None:
            check_report(path, [trace])
    if plot is not None:
        if plot.suffix.lower() not in SUFFIXES:
            raise InvalidProblemError(
                f"--plot {plot}: wanted one of {', '.join(SUFFIXES)}"
            )
        if not can_plot():
            raise MissingDependencyError("--plot needs pip install 'moetuner[plot]'")
        if csv is not None and csv.resolve() == plot.resolve():
            raise InvalidProblemError(f"--plot {plot}: that is --csv")
    if placements is not None:
        if placements.exists() and not placements.is_dir():
            raise InvalidProblemError(
                f"--placements {placements}: a file, wanted a folder"
            )
        placements.mkdir(parents=True, exist_ok=True)
