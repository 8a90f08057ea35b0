"""`moetuner plan` and `moetuner demo`: from a trace to a placement with its scores."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from moetuner.cli.interrupts import keep_in_mind
from moetuner.cli.messages import note
from moetuner.cli.options import (
    CostOptions,
    Json,
    Quiet,
    Seed,
    SolverName,
    Threads,
    TopK,
    TracePath,
    priced_words,
    topology_of,
)
from moetuner.errors import InvalidProblemError
from moetuner.planning.baselines import Baselines
from moetuner.planning.options import PlanOptions, Pricing
from moetuner.solver import SOLVERS, SolverOptions
from moetuner.solver.base import Clock
from moetuner.solver.joint.config import JointConfig
from moetuner.solver.joint.profiles import Favour

if TYPE_CHECKING:
    from collections.abc import Sequence

    from moetuner.placement.model import Placement
    from moetuner.placement.topology import Topology
    from moetuner.trace import CountTrace, Trace


_DEMO_NETWORK = "ethernet-100"  # between nodes, placement matters most


@dataclass(frozen=True, kw_only=True)
class Outputs:
    """Where results go."""

    out: Annotated[Path, typer.Option(help="Placement file to write")]
    moves: Annotated[
        Path | None, typer.Option(help="With --from: JSON file of the moves, in order")
    ] = None
    page: Annotated[
        Path | None, typer.Option("--report", help="HTML report to write")
    ] = None
    as_json: Json = False
    quiet: Quiet = False


@dataclass(frozen=True, kw_only=True)
class JointOptions:
    """What only the solver joint is told."""

    favour: Annotated[
        Favour,
        typer.Option(
            help="joint: time of other tokens, few ranks per token, time of this trace"
        ),
    ] = Favour.TIME
    from_placement: Annotated[
        Path | None,
        typer.Option("--from", help="joint: placement in use; move what pays"),
    ] = None
    move_cost: Annotated[
        float,
        typer.Option(help="Microseconds of a batch that each moved expert must save"),
    ] = 0.0

    def in_use(self) -> Placement | None:
        """The placement that a plan starts from."""
        from moetuner.placement.file import read_placement

        used = self.from_placement
        return None if used is None else read_placement(used)

    def config(self, solver: str, in_use: Placement | None) -> JointConfig | None:
        """Options of `joint`; None for another solver, which takes none of them."""
        if self.from_placement is None and self.move_cost:
            raise InvalidProblemError("--move-cost needs --from")
        if not 0 <= self.move_cost < math.inf:
            raise InvalidProblemError(
                f"--move-cost must be at least 0 microseconds, got {self.move_cost:g}"
            )
        if solver == "joint":
            return JointConfig(
                favour=self.favour,
                stay=in_use,
                move_seconds=self.move_cost * 1e-6,
            )
        if self.from_placement is not None or self.favour is not Favour.TIME:
            raise InvalidProblemError(
                f"--favour and --from are for --solver joint, got --solver {solver}"
            )
        return None


def plan(
    trace: TracePath,
    *,
    ranks: Annotated[
        int, typer.Option(help="GPUs of the expert-parallel group", min=1)
    ],
    ranks_per_node: Annotated[
        int | None,
        typer.Option(help="GPUs per node  [default: the hardware's, or all]", min=1),
    ] = None,
    slots_per_rank: Annotated[
        int, typer.Option(help="0: just enough; joint fills more with replicas", min=0)
    ] = 0,
    redundant: Annotated[
        int | None,
        typer.Option(help="Redundant experts of a layer, as engines count", min=0),
    ] = None,
    solver: Annotated[
        SolverName, typer.Option(metavar="<name>", help=", ".join(SOLVERS))
    ] = SolverName["joint"],
    time_limit: Annotated[
        float, typer.Option(help="Seconds for baselines, solver and scores together")
    ] = 60.0,
    seed: Seed = 0,
    threads: Threads = 0,
    split: Annotated[
        float, typer.Option(help="Share of tokens to plan on; 1: all, none held out")
    ] = 0.5,
    refit: Annotated[
        bool,
        typer.Option("--refit", help="After scoring, plan anew on all tokens"),
    ] = False,
    also: Annotated[
        list[Path] | None,
        typer.Option(help="One more trace that the plan is for; may be repeated"),
    ] = None,
    worst_case: Annotated[
        bool,
        typer.Option("--worst-case", help="Of the traces, the slowest one counts"),
    ] = False,
    joint: JointOptions,
    prove: Annotated[
        float,
        typer.Option(help="Seconds more for a lower bound; 0: none"),
    ] = 10.0,
    baselines: Annotated[
        Baselines,
        typer.Option(help="What stands beside the plan; all: ilp2 too, half the time"),
    ] = Baselines.QUICK,
    cost: CostOptions,
    top_k: TopK = None,
    outputs: Outputs,
) -> None:
    """Plan on one part of a trace, score on the other, write the placement.

    With --from, what no option says is priced as the placement in use was planned.
    """
    from moetuner.planning.provenance import pricing_of
    from moetuner.planning.redundancy import slots_with_redundant
    from moetuner.planning.refit import refit_seconds
    from moetuner.report.outputs import check_outputs
    from moetuner.trace import read_trace

    clock = Clock(time_limit=time_limit)  # reading the trace is in the limit too
    files = [trace, *(also or [])]
    check_outputs(files, outputs.out, outputs.page, outputs.moves, joint.from_placement)
    if worst_case and not also:
        raise InvalidProblemError("--worst-case needs --also")
    if outputs.moves is not None and joint.from_placement is None:
        raise InvalidProblemError("--moves needs --from")
    if redundant is not None and slots_per_rank:
        raise InvalidProblemError("give --redundant or --slots-per-rank, not both")
    in_use = joint.in_use()
    told = None if in_use is None else pricing_of(in_use)
    machine = cost.machine((told or Pricing()).cost.hardware)
    topology = topology_of(ranks, ranks_per_node, outputs.quiet, machine)
    traces = [read_trace(path, top_k=top_k) for path in files]
    pricing = cost.pricing(traces, outputs.quiet, in_use)
    if redundant is not None:
        experts = traces[0].num_experts
        slots_per_rank = slots_with_redundant(experts, ranks, redundant)
    options = PlanOptions(
        solver=solver.value,
        config=joint.config(solver.value, in_use),
        solver_options=SolverOptions(time_limit=time_limit, seed=seed, threads=threads),
        slots_per_rank=slots_per_rank,
        plan_fraction=split,
        refit=refit,
        worst_case=worst_case,
        baselines=baselines,
        prove_seconds=prove,
    ).priced_as(pricing)
    if in_use is not None:
        words = priced_words(pricing, in_use, str(joint.from_placement))
        note(words, outputs.quiet)
    if refit:
        note(
            f"--refit: up to {time_limit:g} s for the plan that is scored, then up to "
            f"{refit_seconds(options):g} s for that of all tokens",
            outputs.quiet,
        )
    _plan_and_show(traces, topology, options, outputs, clock)


def demo(
    out_dir: Annotated[Path, typer.Option(help="Folder for the results")] = Path(
        "moetuner-demo"
    ),
    time_limit: Annotated[
        float, typer.Option(help="Seconds for baselines, solver and scores together")
    ] = 40.0,
    threads: Threads = 0,
    quiet: Quiet = False,
) -> None:
    """Plan the shipped trace of a real model for 8 GPUs, and report it.

    They are H100s on two nodes with 100 Gb/s Ethernet between.
    """
    from moetuner.placement.topology import Topology
    from moetuner.planning.plan import demo_trace
    from moetuner.report.outputs import check_writable
    from moetuner.report.table import description_table
    from moetuner.report.terminal import print_content
    from moetuner.trace.description import describe as describe_trace

    if out_dir.exists() and not out_dir.is_dir():
        raise InvalidProblemError(f"--out-dir {out_dir}: a file, wanted a folder")
    trace = demo_trace()
    out_dir.mkdir(parents=True, exist_ok=True)
    outputs = Outputs(
        out=out_dir / "placement.json", page=out_dir / "report.html", quiet=quiet
    )
    check_writable(outputs.out)
    print_content(description_table(describe_trace(trace)))
    options = PlanOptions(
        solver_options=SolverOptions(time_limit=time_limit, threads=threads),
        cost=CostOptions(network=_DEMO_NETWORK).pricing([trace], quiet).cost,
    )
    _plan_and_show([trace], Topology(num_ranks=8, ranks_per_node=4), options, outputs)


def _plan_and_show(
    traces: Sequence[Trace | CountTrace],
    topology: Topology,
    options: PlanOptions,
    outputs: Outputs,
    clock: Clock | None = None,
) -> None:
    """Write the placement as soon as there is one, all else after scoring."""
    from moetuner.placement.file import write_placement
    from moetuner.planning.plan import plan_trace
    from moetuner.planning.spare import spare_slots
    from moetuner.report.html import write_report
    from moetuner.report.json import comparison_json
    from moetuner.report.moves import write_moves
    from moetuner.report.progress import ProgressLine
    from moetuner.report.terminal import (
        print_comparison,
        print_content,
        print_json,
        print_sentences,
    )

    written, kept = [], []

    def keep(placement: Placement) -> None:
        write_placement(placement, outputs.out)
        keep_in_mind(f"interrupted while scoring; {outputs.out} holds the placement")
        written.append(outputs.out)
        kept.append(placement)
        if outputs.moves is not None and options.stay is not None:
            write_moves(options.stay, placement, outputs.moves)
            written.append(outputs.moves)
        if placement.provenance.status == "interrupted":
            note(
                f"interrupted: {outputs.out} holds the best placement found so far",
                outputs.quiet,
            )

    with ProgressLine() as line:
        comparison = plan_trace(
            *(traces[0], topology, options),
            others=traces[1:],
            progress=None if outputs.quiet else line.update,
            on_solved=keep,
            clock=clock,
        )
    solved = comparison.refit or comparison.result
    if solved.placement is not kept[-1]:  # it has a better bound now
        write_placement(solved.placement, outputs.out)
    if outputs.page is not None:
        write_report(comparison, outputs.page)
        written.append(outputs.page)
    if options.refit and comparison.refit is None:
        why = "nothing was held out" if comparison.in_sample else "it was interrupted"
        note(
            f"no plan was made anew: {why}; {outputs.out} is what is scored",
            outputs.quiet,
        )
    if outputs.as_json:
        print_json(comparison_json(comparison))
        return
    print_comparison(comparison)
    if (spare := spare_slots(comparison, options.pricing)) is not None:
        print_sentences(spare.words())
    for path in dict.fromkeys(written):
        print_content(f"wrote {path}")
