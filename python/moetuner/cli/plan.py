"""`moetuner plan` and `moetuner demo`: from a trace to a placement with its scores."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from moetuner.cli.messages import fail, note
from moetuner.cli.options import (
    BatchKindOption,
    BatchTokens,
    ExpertHiddenSize,
    HardwareName,
    HardwareOption,
    HiddenSize,
    HomesOption,
    Json,
    Quiet,
    RankSpeeds,
    RequestHomesOption,
    SolverName,
    TracePath,
    WireOption,
    cost_model,
    default_wire,
    request_homes_of,
    topology_of,
)
from moetuner.errors import InvalidProblemError
from moetuner.evaluation.cost import Homes, Wire
from moetuner.evaluation.workload import DEFAULT_BATCH_TOKENS, BatchKind
from moetuner.planning.baselines import Baselines
from moetuner.solver.joint.profiles import Favour

if TYPE_CHECKING:
    from collections.abc import Sequence

    from moetuner.placement.model import Placement
    from moetuner.placement.topology import Topology
    from moetuner.trace import CountTrace, Trace


def plan(
    trace: TracePath,
    ranks: Annotated[
        int, typer.Option(help="GPUs of the expert-parallel group", min=1)
    ],
    out: Annotated[Path, typer.Option(help="Placement file to write")],
    ranks_per_node: Annotated[
        int | None, typer.Option(help="GPUs per node  [default: 8, or all]", min=1)
    ] = None,
    solver: Annotated[SolverName, typer.Option(help="Method")] = SolverName["joint"],
    time_limit: Annotated[float, typer.Option(help="Seconds for the solver")] = 60.0,
    seed: Annotated[
        int, typer.Option(help="Of split, solver, bootstrap", min=0, max=2**31 - 1)
    ] = 0,
    threads: Annotated[int, typer.Option(help="0: all cores", min=0)] = 0,
    split: Annotated[float, typer.Option(help="Share of tokens to plan on")] = 0.5,
    also: Annotated[
        list[Path] | None,
        typer.Option(help="One more trace that the plan is for; may be repeated"),
    ] = None,
    weight: Annotated[
        list[float] | None,
        typer.Option(help="What each trace counts for, in order  [default: alike]"),
    ] = None,
    worst_case: Annotated[
        bool,
        typer.Option("--worst-case", help="Of the traces, the slowest one counts"),
    ] = False,
    slots_per_rank: Annotated[
        int, typer.Option(help="0: just enough; joint fills more with replicas", min=0)
    ] = 0,
    favour: Annotated[
        Favour,
        typer.Option(
            help="joint: time of other tokens, few copies, time of this trace"
        ),
    ] = Favour.TIME,
    copy_weight: Annotated[
        float, typer.Option(help="With --favour copies: what they count for even loads")
    ] = 1.0,
    from_placement: Annotated[
        Path | None,
        typer.Option("--from", help="joint: placement in use; move what pays"),
    ] = None,
    move_cost: Annotated[
        float,
        typer.Option(help="Microseconds of a batch that each moved expert must save"),
    ] = 0.0,
    moves: Annotated[
        Path | None, typer.Option(help="With --from: JSON file of the moves, in order")
    ] = None,
    prove: Annotated[
        float, typer.Option(help="Seconds for a lower bound of the result; 0: none")
    ] = 10.0,
    free_sizes: Annotated[
        bool,
        typer.Option(
            "--free-sizes", help="Cluster sizes may differ, as the paper prints it"
        ),
    ] = False,
    memory_slack: Annotated[
        int | None, typer.Option(help="Row (13): experts off an equal share", min=0)
    ] = None,
    baselines: Annotated[
        Baselines,
        typer.Option(help="What stands beside the plan; all: also ilp2, in its time"),
    ] = Baselines.QUICK,
    request_homes: RequestHomesOption = "",
    wire: WireOption = None,
    homes: HomesOption = Homes.UNIFORM,
    batch_tokens: BatchTokens = DEFAULT_BATCH_TOKENS,
    batch_kind: BatchKindOption = BatchKind.SEQUENCES,
    hardware: HardwareOption = HardwareName["h100"],
    rank_speeds: RankSpeeds = "",
    hidden_size: HiddenSize = None,
    expert_hidden_size: ExpertHiddenSize = None,
    plot: Annotated[
        Path | None, typer.Option(help="Figure to write (.png, .svg, .pdf)")
    ] = None,
    page: Annotated[
        Path | None, typer.Option("--report", help="HTML report to write")
    ] = None,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Plan on one part of a trace, score on the other, write the placement."""
    from moetuner.placement.file import read_placement
    from moetuner.planning.options import PlanOptions
    from moetuner.report.outputs import check_outputs
    from moetuner.solver import SolverOptions
    from moetuner.trace import read_trace

    more = also or []
    check_outputs([trace, *more], out, plot, page, moves, from_placement)
    if worst_case and weight:
        raise InvalidProblemError("--worst-case has no use for --weight")
    if not more and (worst_case or weight):
        raise InvalidProblemError("--weight and --worst-case need --also")
    if from_placement is None and (moves is not None or move_cost):
        raise InvalidProblemError("--moves and --move-cost need --from")
    topology = topology_of(ranks, ranks_per_node, quiet)
    routing = read_trace(trace)
    others = [read_trace(path) for path in more]
    wire = wire or default_wire([routing, *others], quiet)
    cost = cost_model(
        routing,
        wire,
        homes,
        hardware.value,
        hidden_size,
        expert_hidden_size,
        quiet,
        rank_speeds,
    )
    options = PlanOptions(
        solver=solver.value,
        solver_options=SolverOptions(time_limit=time_limit, seed=seed, threads=threads),
        cost=cost,
        slots_per_rank=slots_per_rank,
        equal_slots=not free_sizes,
        memory_slack=memory_slack,
        plan_fraction=split,
        batch_tokens=batch_tokens,
        batch_kind=batch_kind,
        weights=tuple(weight or ()),
        worst_case=worst_case,
        baselines=baselines,
        request_homes=request_homes_of(request_homes),
        favour=favour,
        copy_weight=copy_weight,
        stay=None if from_placement is None else read_placement(from_placement),
        move_seconds=move_cost * 1e-6,
        prove_seconds=prove,
    )
    _run_plan(
        routing, topology, options, out, plot, page, as_json, quiet, moves, others
    )


def demo(
    out_dir: Annotated[Path, typer.Option(help="Folder for the results")] = Path(
        "moetuner-demo"
    ),
    time_limit: Annotated[float, typer.Option(help="Seconds for the solver")] = 40.0,
    threads: Annotated[int, typer.Option(help="0: all cores", min=0)] = 0,
    quiet: Quiet = False,
) -> None:
    """Plan the shipped trace of a real model for 8 GPUs on 2 nodes, and report it."""
    from moetuner.placement.topology import Topology
    from moetuner.planning.options import PlanOptions
    from moetuner.planning.plan import demo_trace
    from moetuner.report.outputs import can_plot, check_writable
    from moetuner.report.table import description_table
    from moetuner.report.terminal import print_content
    from moetuner.solver import SolverOptions
    from moetuner.trace.description import describe as describe_trace

    if out_dir.exists() and not out_dir.is_dir():
        raise InvalidProblemError(f"{out_dir}: a file, wanted a folder")
    trace = demo_trace()
    out_dir.mkdir(parents=True, exist_ok=True)
    out, plot = out_dir / "placement.json", out_dir / "before-after.png"
    check_writable(out)
    print_content(description_table(describe_trace(trace)))
    if not can_plot():
        note("no plot: that needs pip install 'moetuner[plot]'", quiet)
    _run_plan(
        trace,
        Topology(num_ranks=8, ranks_per_node=4),
        PlanOptions(
            solver_options=SolverOptions(time_limit=time_limit, threads=threads),
            cost=cost_model(trace, Wire.DEDUP, Homes.UNIFORM, "h100", quiet=quiet),
        ),
        out,
        plot if can_plot() else None,
        out_dir / "report.html",
        as_json=False,
        quiet=quiet,
    )


def _run_plan(
    trace: Trace | CountTrace,
    topology: Topology,
    options: Any,
    out: Path,
    plot: Path | None,
    page: Path | None,
    as_json: bool,
    quiet: bool,
    moves: Path | None = None,
    others: Sequence[Trace | CountTrace] = (),
) -> None:
    from moetuner.placement.file import write_placement
    from moetuner.planning.comparison import comparison_of_plan
    from moetuner.planning.plan import plan_trace
    from moetuner.report.html import write_report
    from moetuner.report.json import plan_json
    from moetuner.report.moves import write_moves
    from moetuner.report.plot import plot_plan
    from moetuner.report.progress import ProgressLine
    from moetuner.report.terminal import print_content, print_json, print_plan
    from moetuner.solver import SolveStatus

    written = []

    def keep(placement: Placement) -> None:
        write_placement(placement, out)
        written.append(out)
        if moves is not None:
            write_moves(options.stay, placement, moves)
            written.append(moves)

    try:
        with ProgressLine() as line:
            progress = None if quiet else line.update
            report = plan_trace(
                *(trace, topology, options),
                others=others,
                progress=progress,
                on_solved=keep,
            )
        if report.result.solution.status is SolveStatus.INTERRUPTED:
            note(f"interrupted: {out} holds the best placement found so far", quiet)
        if plot is not None:
            plot_plan(report, plot)
            written.append(plot)
        if page is not None:
            write_report(comparison_of_plan(trace, report), page)
            written.append(page)
    except KeyboardInterrupt:
        if not written:
            raise
        fail(f"interrupted while scoring; {out} holds the placement", 130)
    if as_json:
        print_json(plan_json(report))
    else:
        print_plan(report)
        for path in written:
            print_content(f"wrote {path}")
