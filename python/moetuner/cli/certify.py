"""The command that proves how good a placement is."""

from __future__ import annotations

from pathlib import Path  # noqa: TC003 (typer reads it)
from typing import Annotated

import typer

from moetuner.cli.options import (
    CostOptions,
    Json,
    Quiet,
    Threads,
    TopK,
    TracePath,
    priced_words,
)


def certify(
    trace: TracePath,
    placement: Annotated[Path, typer.Argument(help="Placement file")],
    time_limit: Annotated[float, typer.Option(help="Seconds for the search")] = 60.0,
    threads: Threads = 0,
    *,
    cost: CostOptions,
    top_k: TopK = None,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Bound the modelled time of every placement from below; print this one's gap.

    What no option says is priced as the placement was planned.
    """
    from moetuner._plain import to_plain
    from moetuner.bounds import certify as prove
    from moetuner.evaluation.tally import check_same_model
    from moetuner.evaluation.workload import Workload
    from moetuner.placement.file import read_placement
    from moetuner.problem import PlacementProblem
    from moetuner.report.progress import ProgressLine
    from moetuner.report.terminal import print_json, print_sentences
    from moetuner.solver import ProgressEvent
    from moetuner.trace import read_trace
    from moetuner.trace.phases import of_phase

    routing, plan = read_trace(trace, top_k=top_k), read_placement(placement)
    check_same_model(routing, plan)
    pricing = cost.pricing([routing], quiet, plan)
    workload = Workload(
        traces=(of_phase(routing, pricing.phase),),
        cost=pricing.cost,
        batch_tokens=pricing.batch_tokens,
        batch_kind=pricing.batch_kind,
    )
    problem = PlacementProblem.from_workload(
        workload, plan.topology, slots_per_rank=plan.slots_per_rank
    )
    with ProgressLine() as line:

        def show(done: int, total: int, bound: float) -> None:
            line.update(
                ProgressEvent(
                    solver="certify",
                    stage="certify",
                    done=done,
                    total=total,
                    incumbent=value,
                    bound=bound,
                )
            )

        value = problem.objective_value(plan)
        proof = prove(
            problem,
            plan,
            time_limit=time_limit,
            threads=threads,
            replicas=plan.has_replicas,
            progress=None if quiet else show,
        )
    if as_json:
        print_json(
            {
                "placement": str(placement),
                **proof.to_json(),
                "pricing": to_plain(pricing),
            }
        )
        return
    print_sentences(priced_words(pricing, plan, str(placement)))
    kind = "with or without replicas" if proof.replicas else "without replicas"
    print_sentences(
        f"{value * 1e3:.4g} ms modelled for a batch; no placement on these slots "
        f"({kind}) takes less than {proof.lower_bound * 1e3:.4g} ms: gap "
        f"{proof.gap or 0.0:.2%} ({proof.seconds:.1f} s)"
    )
