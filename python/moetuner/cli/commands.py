"""Commands that look at what there is: `describe`, `evaluate`."""

from __future__ import annotations

from pathlib import Path  # noqa: TC003 - typer reads annotations
from typing import Annotated

import typer

from moetuner.cli.messages import note
from moetuner.cli.options import (
    CostOptions,
    Json,
    OfPhase,
    Quiet,
    TopK,
    TracePath,
    of_named_phase,
    priced_words,
)
from moetuner.errors import InvalidPlacementError
from moetuner.evaluation.workload import DEFAULT_BATCH_TOKENS, BatchKind
from moetuner.trace.phases import Phase


def describe(
    trace: TracePath,
    ranks: Annotated[
        int, typer.Option(help="GPUs that share the experts; 0: a node of 8", min=0)
    ] = 0,
    batch_tokens: Annotated[
        int, typer.Option(help="Tokens of a batch, about; 0: all in one", min=0)
    ] = DEFAULT_BATCH_TOKENS,
    batch_kind: Annotated[
        BatchKind | None,
        typer.Option(
            help="Whole sequences (prefill) or tokens of all (decode)  "
            "[default: sequences; mixed with --phase decode]"
        ),
    ] = None,
    top_k: TopK = None,
    phase: OfPhase = None,
    as_json: Json = False,
) -> None:
    """Say what a trace holds: sizes, skew, affinity, what is missing."""
    from moetuner.planning.skew import measure_skew
    from moetuner.report.skew import skew_table, skew_words
    from moetuner.report.table import description_table
    from moetuner.report.terminal import print_content, print_json, print_sentences
    from moetuner.trace import read_trace
    from moetuner.trace.description import describe as describe_trace

    routing = of_named_phase(read_trace(trace, top_k=top_k), phase)
    description = describe_trace(routing)
    decodes = phase is not None and phase.value == Phase.DECODE.value
    kind = batch_kind or (BatchKind.MIXED if decodes else BatchKind.SEQUENCES)
    skew = measure_skew(routing, ranks, batch_tokens=batch_tokens, batch_kind=kind)
    if as_json:
        print_json({**description.to_json(), "skew": skew.to_json()})
        return
    print_content(description_table(description))
    print_content(skew_table(skew))
    print_sentences(skew_words(skew))


def evaluate(
    trace: TracePath,
    placements: Annotated[list[Path], typer.Argument(help="Placement files")],
    *,
    cost: CostOptions,
    top_k: TopK = None,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Score placements on every token of a trace.

    What no option says is priced as the first placement was planned.
    """
    from moetuner._plain import to_plain
    from moetuner.evaluation.evaluate import evaluate as score
    from moetuner.placement.file import read_placement
    from moetuner.report.table import (
        LEGEND,
        PER_GPU,
        batch_table,
        differ_in_gpus,
        evaluation_table,
    )
    from moetuner.report.terminal import print_content, print_json, print_sentences
    from moetuner.trace import read_trace
    from moetuner.trace.phases import of_phase

    routing = read_trace(trace, top_k=top_k)
    names, plans = (
        [str(path) for path in placements],
        list(map(read_placement, placements)),
    )
    pricing = cost.pricing([routing], quiet, plans[0])
    sha256, scores = routing.sha256(), []
    scored = of_phase(routing, pricing.phase)
    for name, plan in zip(names, plans, strict=True):
        origin = plan.provenance
        if sha256 in (origin.trace_sha256, *origin.other_traces):
            note(
                f"{name} was planned on tokens of this trace: on others it gains less; "
                f"moetuner report scores what was held out",
                quiet,
            )
        try:
            scores.append(
                score(
                    scored,
                    plan,
                    pricing.cost,
                    batch_tokens=pricing.batch_tokens,
                    batch_kind=pricing.batch_kind,
                )
            )
        except InvalidPlacementError as error:
            raise InvalidPlacementError(f"{name}: {error}") from error
    if as_json:
        priced = to_plain(pricing)
        print_json(
            [
                {"placement": name, **evaluation.to_json(), "pricing": priced}
                for name, evaluation in zip(names, scores, strict=True)
            ]
        )
    else:
        print_sentences(priced_words(pricing, plans[0], names[0]))
        print_content(evaluation_table(names, scores))
        print_content(batch_table(names, scores))
        print_sentences(LEGEND)
        if differ_in_gpus(scores):
            print_sentences(PER_GPU)
