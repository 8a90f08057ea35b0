"""Commands that look at what there is: `describe`, `evaluate`, `verify`."""

from __future__ import annotations

from pathlib import Path  # noqa: TC003 - typer reads annotations
from typing import Annotated

import typer

from moetuner.cli.messages import fail
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
    TracePath,
    WireOption,
    cost_model,
    default_wire,
    request_homes_of,
)
from moetuner.errors import (
    InvalidPlacementError,
    InvalidTraceError,
)
from moetuner.evaluation.cost import Homes
from moetuner.evaluation.workload import DEFAULT_BATCH_TOKENS, BatchKind

_MOST_SHOWN = 20  # differences; --json has all


def describe(trace: TracePath, as_json: Json = False) -> None:
    """Say what a trace holds: sizes, skew, affinity, what is missing."""
    from moetuner.report.table import description_table
    from moetuner.report.terminal import print_content, print_json
    from moetuner.trace import read_trace
    from moetuner.trace.description import describe as describe_trace

    description = describe_trace(read_trace(trace))
    if as_json:
        print_json(description.to_json())
    else:
        print_content(description_table(description))


def evaluate(
    trace: TracePath,
    placements: Annotated[list[Path], typer.Argument(help="Placement files")],
    request_homes: RequestHomesOption = "",
    wire: WireOption = None,
    homes: HomesOption = Homes.UNIFORM,
    batch_tokens: BatchTokens = DEFAULT_BATCH_TOKENS,
    batch_kind: BatchKindOption = BatchKind.SEQUENCES,
    hardware: HardwareOption = HardwareName["h100"],
    rank_speeds: RankSpeeds = "",
    hidden_size: HiddenSize = None,
    expert_hidden_size: ExpertHiddenSize = None,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Score placements on every token of a trace."""
    from moetuner.evaluation.evaluate import evaluate as score
    from moetuner.placement.file import read_placement
    from moetuner.planning.request_homes import (
        ScoredHomes,
        check_sequences,
        score_homes,
    )
    from moetuner.report.table import (
        LEGEND,
        batch_table,
        evaluation_table,
        homes_table,
    )
    from moetuner.report.terminal import print_content, print_json
    from moetuner.trace import read_trace

    routing = read_trace(trace)
    wire = wire or default_wire([routing], quiet)
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
    known = request_homes_of(request_homes)
    if known is not None:
        check_sequences(routing, batch_kind)
    names, scores = [str(path) for path in placements], []
    homed: dict[str, ScoredHomes] = {}
    for path in placements:
        placement = read_placement(path)
        try:
            scores.append(
                score(
                    routing,
                    placement,
                    cost,
                    batch_tokens=batch_tokens,
                    batch_kind=batch_kind,
                )
            )
        except InvalidPlacementError as error:
            raise InvalidPlacementError(f"{path}: {error}") from error
        if known is not None:
            homed[str(path)] = score_homes(
                routing, placement, cost, known, batch_tokens=batch_tokens
            )
    if as_json:
        print_json(
            [
                {
                    "placement": name,
                    **evaluation.to_json(),
                    **({"request_homes": homed[name].to_json()} if homed else {}),
                }
                for name, evaluation in zip(names, scores, strict=True)
            ]
        )
    else:
        print_content(evaluation_table(names, scores))
        print_content(batch_table(names, scores))
        if homed:
            print_content(homes_table(homed))
        print_content(LEGEND)


def verify(
    trace: Annotated[Path, typer.Argument(help="Run recorded by record_run")],
    placement: Annotated[Path, typer.Argument(help="Placement file of the run")],
    counters: Annotated[Path, typer.Argument(help="Counters file of the run")],
    as_json: Json = False,
) -> None:
    """Compare counted traffic with the evaluator's prediction: exit 1 unless equal."""
    from dataclasses import asdict

    from moetuner.evaluation.verify import read_record
    from moetuner.evaluation.verify import verify as compare
    from moetuner.placement.file import read_placement
    from moetuner.report.terminal import print_content, print_json
    from moetuner.trace import Trace, read_trace

    run, record = read_trace(trace), read_record(counters)
    if not isinstance(run, Trace):
        raise InvalidTraceError(f"{trace}: only counts, wanted the ids of each token")
    different = compare(run, read_placement(placement), record)
    compared = record.counts.size
    if as_json:
        found = [asdict(difference) for difference in different]
        print_json({"equal": not found, "numbers": compared, "different": found})
    elif not different:
        layers, ranks, _ = record.counts.shape
        print_content(
            f"equal: all {compared} counters of {layers} layers on {ranks} ranks "
            f"are as predicted for {run.num_tokens} tokens"
        )
    for difference in different[: 0 if as_json else _MOST_SHOWN]:
        print_content(str(difference))
    if different:
        fail(f"{len(different)} of {compared} counters are not as predicted", 1)
