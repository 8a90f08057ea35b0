"""`moetuner verify`: what a run did, against what was predicted of it."""

from __future__ import annotations

from dataclasses import asdict, replace
from pathlib import Path  # noqa: TC003 - typer reads annotations
from typing import TYPE_CHECKING, Annotated, Any

import typer

from moetuner._words import amount, verb
from moetuner.cli.messages import fail
from moetuner.cli.options import CostOptions, Json, Quiet, priced_words
from moetuner.errors import InvalidProblemError, InvalidTraceError
from moetuner.evaluation.cost import Homes

if TYPE_CHECKING:
    from moetuner.evaluation.step_times import PartTimes
    from moetuner.placement.model import Placement
    from moetuner.trace import Trace

_MAX_SHOWN = 20  # differences; --json has all


def verify(
    trace: Annotated[Path, typer.Argument(help="Run recorded by record_run")],
    placement: Annotated[Path, typer.Argument(help="Placement file of the run")],
    counters: Annotated[
        Path | None, typer.Argument(help="Counters file of the run")
    ] = None,
    times: Annotated[
        Path | None,
        typer.Option(
            help="Measured times: a CSV, or what nsys stats or torch.profiler print"
        ),
    ] = None,
    within: Annotated[
        float, typer.Option(help="How far predicted times may be off", min=0)
    ] = 0.15,
    *,
    cost: CostOptions,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Compare counted traffic and measured times with the prediction.

    Exit 1 unless counters are equal and times within `--within`. Times are priced as
    the placement was planned, where no option says otherwise.
    """
    from moetuner.placement.file import read_placement
    from moetuner.report.terminal import print_json
    from moetuner.trace import Trace, read_trace

    if counters is None and times is None:
        raise InvalidProblemError("verify: give the counters of the run, or --times")
    run, plan = read_trace(trace), read_placement(placement)
    if not isinstance(run, Trace):
        raise InvalidTraceError(f"{trace}: only counts, wanted the ids of each token")
    told: dict[str, Any] = {}
    trouble = []
    if counters is not None:
        trouble.append(_verify_counters(run, plan, counters, told, as_json))
    if times is not None:
        found = _compare(run, plan, times, str(placement), cost, quiet or as_json)
        trouble.append(_tell_times(found, within, told, as_json))
    if as_json:
        print_json(told)
    said = "; ".join(filter(None, trouble))
    if said:
        fail(said, 1)


def _verify_counters(
    run: Trace, plan: Placement, counters: Path, told: dict[str, Any], as_json: bool
) -> str:
    """What is wrong; empty when all is as predicted."""
    from moetuner.evaluation.verify import read_record
    from moetuner.evaluation.verify import verify as compare
    from moetuner.report.terminal import print_content

    record = read_record(counters)
    different = compare(run, plan, record)
    compared = record.counts.size
    found = [asdict(difference) for difference in different]
    told |= {"equal": not found, "numbers": compared, "different": found}
    if not different and not as_json:
        layers, ranks, _ = record.counts.shape
        print_content(
            f"equal: all {compared} counters of {amount(layers, 'layer')} on "
            f"{amount(ranks, 'rank')} are as predicted for "
            f"{amount(run.num_tokens, 'token')}"
        )
    for difference in different[: 0 if as_json else _MAX_SHOWN]:
        print_content(str(difference))
    if not different:
        return ""
    return (
        f"{len(different)} of {compared} counters "
        f"{verb(len(different), 'is', 'are')} not as predicted"
    )


def _compare(
    run: Trace,
    plan: Placement,
    times: Path,
    name: str,
    cost: CostOptions,
    quiet: bool,
) -> list[PartTimes]:
    from moetuner.evaluation.step_times import compare_times
    from moetuner.evaluation.times_file import read_times
    from moetuner.report.terminal import print_sentences
    from moetuner.trace import Trace
    from moetuner.trace.phases import of_phase

    if cost.homes is None and run.home_rank is not None:
        cost = replace(cost, homes=Homes.RECORDED)  # of the run, whatever was planned
    pricing = cost.pricing([run], quiet, plan)
    if cost.phase is None:  # of the run, whatever was planned
        pricing = replace(pricing, phase=None)
    chosen = of_phase(run, pricing.phase)
    assert isinstance(chosen, Trace)
    found = compare_times(
        chosen,
        plan,
        pricing.cost,
        read_times(times),
        batch_tokens=pricing.batch_tokens,
        batch_kind=pricing.batch_kind,
    )
    if not quiet:
        print_sentences(priced_words(pricing, plan, name))
    return found


def _tell_times(
    found: list[PartTimes], within: float, told: dict[str, Any], as_json: bool
) -> str:
    """What is wrong; empty when all is as predicted."""
    from moetuner.report.terminal import print_content
    from moetuner.report.times import times_table, times_verdict

    told["within"] = within
    told["times"] = [
        {
            "part": one.part.value,
            "layer": one.layer,
            "predicted_seconds": one.predicted,
            "measured_seconds": one.measured,
            "within": one.error <= within,
        }
        for one in found
    ]
    verdict = times_verdict(found, within)
    if not as_json:
        print_content(times_table(found, within))
    if all(one.error <= within for one in found):
        if not as_json:
            print_content(verdict)
        return ""
    return verdict
