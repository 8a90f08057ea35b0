"""The command line: results on standard output, progress and errors on standard error.

Exit codes: 0 done, 1 failed, 2 wrong usage or unusable input, 130 interrupted with
nothing to save. Heavy modules are imported by the command that needs them.
"""

from __future__ import annotations

import enum
import json
import sys
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from moetuner.cost import HARDWARE, CostModel, Homes, ModelShape, Wire
from moetuner.errors import (
    InvalidPlacementError,
    InvalidProblemError,
    InvalidTraceError,
    MissingStatisticsError,
    MoetunerError,
    SolverError,
)
from moetuner.solver import SOLVERS

if TYPE_CHECKING:
    from collections.abc import Iterator

    from moetuner.pipeline import PlanReport
    from moetuner.topology import Topology
    from moetuner.trace import CountTrace, Trace

app = typer.Typer(
    name="moetuner",
    help="Which GPU should hold which expert? Plan and score expert placements.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)

SolverName = enum.Enum("SolverName", {n: n for n in SOLVERS}, type=str)  # type: ignore[misc]
HardwareName = enum.Enum("HardwareName", {n: n for n in HARDWARE}, type=str)  # type: ignore[misc]

_TracePath = Annotated[Path, typer.Argument(help="Routing trace: safetensors or .npz")]
_Json = Annotated[bool, typer.Option("--json", help="Print JSON instead of a table")]
_Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="No progress, no notes")]
_Wire = Annotated[Wire, typer.Option(help="What crosses the network for one token")]
_Homes = Annotated[Homes, typer.Option(help="Where a token is when a layer begins")]
_Hardware = Annotated[HardwareName, typer.Option(help="Kind of GPU node")]
_Hidden = Annotated[int | None, typer.Option(help="Hidden size, when unknown", min=1)]
_ExpertHidden = Annotated[
    int | None, typer.Option(help="Inner width of one expert, when unknown", min=1)
]


def main() -> None:
    """Entry point; turns the package's errors into messages and exit codes."""
    try:
        app()
    except MoetunerError as error:
        _fail(str(error), _exit_code(error))
    except FileNotFoundError as error:
        _fail(f"{error.filename}: no such file or folder", 2)
    except OSError as error:
        _fail(f"{error.filename or ''}: {error.strerror or error}", 1)
    except KeyboardInterrupt:
        _fail("interrupted, nothing was written", 130)


@app.callback(invoke_without_command=True)
def _version(
    version: Annotated[
        bool, typer.Option("--version", help="Print the version")
    ] = False,
) -> None:
    if version:
        import moetuner

        typer.echo(f"moetuner {moetuner.__version__}")
        raise typer.Exit


@app.command()
def describe(trace: _TracePath, as_json: _Json = False) -> None:
    """Say what a trace holds: sizes, skew, affinity, what is missing."""
    from moetuner.describe import describe as describe_trace
    from moetuner.report.table import description_table
    from moetuner.trace import read_trace

    description = describe_trace(read_trace(trace))
    if as_json:
        _print_json(description.to_json())
    else:
        _print(description_table(description))


@app.command()
def plan(
    trace: _TracePath,
    ranks: Annotated[int, typer.Option(help="GPUs of the expert-parallel group")],
    out: Annotated[Path, typer.Option(help="Placement file to write")],
    ranks_per_node: Annotated[
        int | None, typer.Option(help="GPUs per node [default: all on one node]")
    ] = None,
    solver: Annotated[SolverName, typer.Option(help="Method")] = SolverName["ilp2"],
    time_limit: Annotated[float, typer.Option(help="Seconds for the solver")] = 60.0,
    seed: Annotated[int, typer.Option(help="Seed of split, solver, bootstrap")] = 0,
    threads: Annotated[int, typer.Option(help="0: all cores", min=0)] = 0,
    split: Annotated[float, typer.Option(help="Share of tokens to plan on")] = 0.5,
    slots_per_rank: Annotated[int, typer.Option(help="0: just enough", min=0)] = 0,
    free_sizes: Annotated[
        bool, typer.Option(help="Cluster sizes may differ, as the paper prints it")
    ] = False,
    memory_slack: Annotated[
        int | None, typer.Option(help="Row (13): experts off an equal share", min=0)
    ] = None,
    wire: _Wire = Wire.DEDUP,
    homes: _Homes = Homes.UNIFORM,
    hardware: _Hardware = HardwareName["h100"],
    hidden_size: _Hidden = None,
    expert_hidden_size: _ExpertHidden = None,
    plot: Annotated[
        Path | None, typer.Option(help="Figure to write (.png, .svg)")
    ] = None,
    as_json: _Json = False,
    quiet: _Quiet = False,
) -> None:
    """Plan on one part of a trace, score on the other, write the placement."""
    from moetuner.pipeline import PlanOptions
    from moetuner.solver import SolverOptions
    from moetuner.topology import Topology
    from moetuner.trace import CountTrace, read_trace

    for path in filter(None, (out, plot)):
        _check_writable(path)
    topology = Topology(num_ranks=ranks, ranks_per_node=ranks_per_node or ranks)
    routing = read_trace(trace)
    if isinstance(routing, CountTrace) and wire is not Wire.ALLGATHER:
        wire = Wire.ALLGATHER
        _note("this source only counted loads: scored with wire=allgather", quiet)
    cost = _cost(routing, wire, homes, hardware, hidden_size, expert_hidden_size, quiet)
    options = PlanOptions(
        solver=solver.value,
        solver_options=SolverOptions(time_limit=time_limit, seed=seed, threads=threads),
        cost=cost,
        slots_per_rank=slots_per_rank,
        equal_slots=not free_sizes,
        memory_slack=memory_slack,
        plan_fraction=split,
    )
    _run_plan(routing, topology, options, out, plot, as_json, quiet)


@app.command()
def evaluate(
    trace: _TracePath,
    placements: Annotated[list[Path], typer.Argument(help="Placement files")],
    wire: _Wire = Wire.DEDUP,
    homes: _Homes = Homes.UNIFORM,
    hardware: _Hardware = HardwareName["h100"],
    hidden_size: _Hidden = None,
    expert_hidden_size: _ExpertHidden = None,
    as_json: _Json = False,
    quiet: _Quiet = False,
) -> None:
    """Score placements on every token of a trace."""
    from moetuner.evaluate import evaluate as score
    from moetuner.placement_file import read_placement
    from moetuner.report.table import evaluation_table
    from moetuner.trace import CountTrace, read_trace

    routing = read_trace(trace)
    if isinstance(routing, CountTrace) and wire is not Wire.ALLGATHER:
        wire = Wire.ALLGATHER
        _note("this source only counted loads: scored with wire=allgather", quiet)
    cost = _cost(routing, wire, homes, hardware, hidden_size, expert_hidden_size, quiet)
    names, scores = [str(path) for path in placements], []
    for path in placements:
        placement = read_placement(path)
        try:
            scores.append(score(routing, placement, cost))
        except InvalidPlacementError as error:
            raise InvalidPlacementError(f"{path}: {error}") from error
    if as_json:
        _print_json(
            [
                {"placement": name, **evaluation.to_json()}
                for name, evaluation in zip(names, scores, strict=True)
            ]
        )
    else:
        _print(evaluation_table(names, scores))


@app.command()
def demo(
    out_dir: Annotated[Path, typer.Option(help="Folder for the results")] = Path(
        "moetuner-demo"
    ),
    time_limit: Annotated[float, typer.Option(help="Seconds for the solver")] = 40.0,
    threads: Annotated[int, typer.Option(help="0: all cores", min=0)] = 0,
    quiet: _Quiet = False,
) -> None:
    """Plan the shipped trace of a real model for 8 GPUs on 2 nodes."""
    from moetuner.describe import describe as describe_trace
    from moetuner.pipeline import PlanOptions, demo_trace
    from moetuner.report.table import description_table
    from moetuner.solver import SolverOptions
    from moetuner.topology import Topology

    trace = demo_trace()
    _print(description_table(describe_trace(trace)))
    out_dir.mkdir(parents=True, exist_ok=True)
    _run_plan(
        trace,
        Topology(num_ranks=8, ranks_per_node=4),
        PlanOptions(
            solver_options=SolverOptions(time_limit=time_limit, threads=threads),
            cost=_cost(
                trace, Wire.DEDUP, Homes.UNIFORM, HardwareName["h100"], quiet=quiet
            ),
        ),
        out_dir / "placement.json",
        out_dir / "before-after.png",
        as_json=False,
        quiet=quiet,
    )


def _run_plan(
    trace: Trace | CountTrace,
    topology: Topology,
    options: Any,
    out: Path,
    plot: Path | None,
    as_json: bool,
    quiet: bool,
) -> None:
    from moetuner.pipeline import plan_trace
    from moetuner.placement_file import write_placement
    from moetuner.report.json import plan_json
    from moetuner.report.plot import plot_plan
    from moetuner.solver import SolveStatus

    with _progress(quiet) as progress:
        report = plan_trace(trace, topology, options, progress=progress)
    write_placement(report.result.placement, out)
    if report.result.solution.status is SolveStatus.INTERRUPTED:
        _note("interrupted: the best placement found until then was kept", quiet)
    if plot is not None:
        plot_plan(report, plot)
    if as_json:
        _print_json(plan_json(report))
    else:
        _print_plan(report)
        for written in filter(None, (out, plot)):
            _print(f"wrote {written}")


def _print_plan(report: PlanReport) -> None:
    from moetuner.report.table import plan_table, stage_table
    from moetuner.report.verdict import verdict

    _print(
        f"planned on {report.plan_tokens:,} tokens, scored on {report.score_tokens:,} "
        f"others (split by sequence); {report.topology.num_ranks} ranks, "
        f"{report.topology.ranks_per_node} per node; "
        f"wire {report.options.cost.wire.value}, "
        f"homes {report.options.cost.homes.value}"
    )
    _print(stage_table(report))
    _print(plan_table(report))
    _print(verdict(report))


def _cost(
    trace: Trace | CountTrace,
    wire: Wire,
    homes: Homes,
    hardware: Any,
    hidden_size: int | None = None,
    expert_hidden_size: int | None = None,
    quiet: bool = False,
) -> CostModel:
    """The cost model; sizes from the options, else the model's, else stated ones."""
    from moetuner.cost import DEFAULT_SHAPE, shape_for_model

    known = shape_for_model(trace.metadata.model)
    shape = known or DEFAULT_SHAPE
    if known is None and not (hidden_size and expert_hidden_size):
        _note(
            f"model {trace.metadata.model or 'unknown'!r} is not in the table: "
            f"assuming hidden size {hidden_size or shape.hidden_size}, "
            f"expert hidden size {expert_hidden_size or shape.expert_hidden_size}; "
            f"set --hidden-size and --expert-hidden-size",
            quiet,
        )
    return CostModel(
        hardware=HARDWARE[hardware.value],
        shape=ModelShape(
            hidden_size=hidden_size or shape.hidden_size,
            expert_hidden_size=expert_hidden_size or shape.expert_hidden_size,
        ),
        wire=wire,
        homes=homes,
    )


@contextmanager
def _progress(quiet: bool) -> Iterator[Any]:
    """A callback that keeps one line on standard error up to date; None when quiet."""
    if quiet:
        yield None
        return
    from moetuner.report.progress import ProgressLine

    with ProgressLine() as line:
        yield line.update


def _check_writable(path: Path) -> None:
    """Find out before a minute of solving that the result has nowhere to go."""
    if path.is_dir():
        raise InvalidProblemError(f"{path}: a folder, wanted a file to write")
    if not path.absolute().parent.is_dir():
        raise InvalidProblemError(f"{path}: its folder does not exist")


def _exit_code(error: MoetunerError) -> int:
    usage = (
        InvalidTraceError,
        InvalidPlacementError,
        InvalidProblemError,
        MissingStatisticsError,
        SolverError,
    )
    return 2 if isinstance(error, usage) else 1


def _fail(message: str, code: int) -> None:
    typer.echo(f"error: {message}", err=True)
    sys.exit(code)


def _note(message: str, quiet: bool) -> None:
    if not quiet:
        typer.echo(f"note: {message}", err=True)


def _print(content: Any) -> None:
    from rich.console import Console

    console = Console(width=None if sys.stdout.isatty() else 132)
    console.print(
        content, markup=False, highlight=False, soft_wrap=isinstance(content, str)
    )


def _print_json(value: Any) -> None:
    typer.echo(json.dumps(value, indent=2, allow_nan=False))
