"""Rich tables of plans, evaluations and traces."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rich import box
from rich.table import Table

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from moetuner.evaluation.evaluate import Evaluation, GainInterval
    from moetuner.planning.plan import PlanReport
    from moetuner.planning.request_homes import ScoredHomes
    from moetuner.trace.description import Range, TraceDescription

# Heads in two lines: every table stays within 80 columns.
_COLUMNS = (
    "load\nmean",
    "load\nworst",
    "remote\nranks",
    "remote\nnodes",
    "busiest\nreceive",
    "time\n(ms)",
)
LEGEND = """\
load: busiest rank / mean rank, mean and worst over layers; remote: ranks and
nodes other than its home that compute a token; busiest receive: rows into the
busiest rank / its even share of tokens; time: modelled, all tokens as one batch"""


def plan_table(report: PlanReport) -> Table:
    """Baselines and result, scored on the held-out part."""
    table = _score_table("placement", title="Scores on held-out tokens")
    table.add_column("gain over contiguous\n[95% interval]", justify="right")
    for candidate in report.candidates:
        last = candidate is report.result
        table.add_row(
            candidate.name,
            *_scores(candidate.evaluation),
            _gain(candidate.gain),
            style="bold" if last else None,
        )
    return table


def evaluation_table(names: Sequence[str], evaluations: Sequence[Evaluation]) -> Table:
    """One row per placement file."""
    table = _score_table("placement")
    for name, evaluation in zip(names, evaluations, strict=True):
        table.add_row(name, *_scores(evaluation))
    return table


def batch_table(names: Sequence[str], evaluations: Sequence[Evaluation]) -> Table:
    """Modelled time of batches, one row per placement; gains over the first."""
    size = evaluations[0].batch_tokens
    title = f"Batches of about {size} tokens" if size else "All tokens as one batch"
    table = _table(f"{title}, modelled (ms)")
    table.add_column("placement", overflow="fold")
    for name in ("batches", "mean", "p95", "p99", "gain in mean"):
        table.add_column(name, justify="right", no_wrap=True)
    first = evaluations[0].batch_seconds_mean
    for name, scores in zip(names, evaluations, strict=True):
        gain = 1 - scores.batch_seconds_mean / first if first else 0.0
        table.add_row(
            name,
            str(scores.batch_seconds.size),
            _number(scores.batch_seconds_mean * 1e3),
            _number(scores.batch_seconds_p95 * 1e3),
            _number(scores.batch_seconds_p99 * 1e3),
            "-" if scores is evaluations[0] else f"{gain:+.1%}",
        )
    return table


def homes_table(scored: Mapping[str, ScoredHomes]) -> Table:
    """Homes of sequences by lengths and by routing, two rows for each placement."""
    table = _table("Homes given to sequences, modelled batches (ms)")
    table.add_column("placement", overflow="fold")
    table.add_column("homes by")
    for name in ("remote\nranks", "mean", "p95", "gain in\nmean", "batches\nfaster"):
        table.add_column(name, justify="right", no_wrap=True)
    for name, both in scored.items():
        faster = f"{both.batches_faster} of {both.by_routing.batch_seconds.size}"
        for words, scores, gain, batches in (
            ("lengths alone", both.by_length, "-", "-"),
            (both.known.words, both.by_routing, f"{both.gain:+.1%}", faster),
        ):
            table.add_row(
                name,
                words,
                _number(scores.remote_ranks_per_token),
                _number(scores.batch_seconds_mean * 1e3),
                _number(scores.batch_seconds_p95 * 1e3),
                gain,
                batches,
            )
    return table


def stage_table(report: PlanReport) -> Table:
    """What the solver claims of each of its stages, on the planning part."""
    table = _table("Solver, on the planning part")
    for name in ("stage", "minimises"):
        table.add_column(name, overflow="fold")
    for name in ("value", "lower\nbound", "gap", "seconds"):
        table.add_column(name, justify="right")
    table.add_column("status")
    solution = report.result.solution
    for stage in solution.stages or ():
        table.add_row(
            stage.name,
            stage.objective.value,
            f"{stage.value:.5g}",
            "-" if stage.lower_bound is None else f"{stage.lower_bound:.5g}",
            "-" if stage.gap is None else f"{stage.gap:.2%}",
            f"{stage.seconds:.2f}",
            stage.status.value,
        )
    if not solution.stages:
        table.add_row(
            report.result.name,
            solution.objective.value,
            f"{solution.value:.5g}",
            "-" if solution.lower_bound is None else f"{solution.lower_bound:.5g}",
            "-" if solution.gap is None else f"{solution.gap:.2%}",
            f"{solution.seconds:.2f}",
            solution.status.value,
        )
    return table


def description_table(description: TraceDescription) -> Table:
    """A trace in numbers."""
    table = Table(show_header=False, box=None)
    table.add_column(style="bold")
    table.add_column()
    layers = description.layers
    gaps = "" if description.consecutive_layers else " (not consecutive)"
    rows = {
        "model": description.model or "unknown",
        "source": f"{description.source} / {description.dataset}",
        "tokens": f"{description.num_tokens:,} in {description.num_sequences:,} "
        f"sequences",
        "layers": f"{len(layers)}: {layers[0]}..{layers[-1]}{gaps}",
        "experts": f"{description.num_experts}, top-{description.top_k}",
        "first expert known": "yes" if description.ranked else "no (no weights)",
        "unused experts": str(description.unused_experts),
        "busiest / mean expert": _range(description.load_skew),
        "co-activation lift": _range(description.coactivation_lift),
        "layer-to-layer lift": _range(description.transition_lift),
        "missing": ", ".join(description.missing) or "nothing",
    }
    for name, value in rows.items():
        table.add_row(name, value)
    return table


def _table(title: str | None = None) -> Table:
    return Table(
        title=title,
        title_justify="left",
        box=box.SIMPLE_HEAD,
        padding=0,
        pad_edge=False,
        show_edge=False,
    )


def _score_table(first: str, title: str | None = None) -> Table:
    table = _table(title)
    table.add_column(first, overflow="fold", vertical="bottom")
    for name in _COLUMNS:
        table.add_column(name, justify="right", no_wrap=True)
    return table


def _scores(scores: Evaluation) -> tuple[str, ...]:
    return (
        f"{scores.imbalance_mean:.3f}",
        f"{scores.imbalance_worst:.3f}",
        _number(scores.remote_ranks_per_token),
        _number(scores.remote_nodes_per_token),
        _number(scores.bottleneck_receive),
        _number(scores.modelled_seconds * 1e3),
    )


def _number(value: float) -> str:
    if value != value:
        return "unknown"
    return f"{value:.3f}" if value < 1000 else f"{value:.0f}"


def _gain(gain: GainInterval | None) -> str:
    if gain is None:
        return "-"
    return f"{gain.gain:+.1%} [{gain.low:+.1%}, {gain.high:+.1%}]"


def _range(values: Range | None) -> str:
    if values is None:
        return "unknown"
    return f"{values.median:.2f} (layers {values.low:.2f} to {values.high:.2f})"
