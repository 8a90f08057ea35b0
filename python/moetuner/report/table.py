"""Rich tables of plans, evaluations and traces."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rich import box
from rich.table import Table

from moetuner._words import amount
from moetuner.report.words import gain_cell, gap, number, percent, solved

if TYPE_CHECKING:
    from collections.abc import Sequence

    from moetuner.evaluation.evaluate import Evaluation
    from moetuner.planning.scores import Comparison
    from moetuner.solver import Solution
    from moetuner.trace.description import Range, TraceDescription

_MAX_LAYERS = 6  # listed with experts that nobody uses
# Heads in two lines: every table stays within 80 columns.
_COLUMNS = (
    "load\nmean",
    "load\nworst",
    "remote\nranks",
    "remote\nnodes",
    "busiest\nreceive",
    "batch\n(ms)",
)
LEGEND = """\
load: busiest rank / mean rank, mean and worst over layers; remote: ranks and
nodes other than its home that compute a token; busiest receive: rows into the
busiest rank / its even share of tokens; batch: modelled time of the mean batch"""
PER_GPU = """\
gain per GPU: in time of the mean batch x GPUs; the GPUs of a placement share a
batch, so that with more of them it is faster and may still cost more"""


def score_table(report: Comparison) -> Table:
    """Baselines and result, scored on the held-out part."""
    title = "Scores on held-out tokens" if report.held_out else "Scores"
    if report.in_sample:
        title = "Scores on the tokens that it is planned on"
    table = _score_table("placement", title=title)
    table.add_column(
        f"gain over {report.baseline.name}\n[95% interval]", justify="right"
    )
    for candidate in report.candidates:
        last = candidate is report.result
        table.add_row(
            candidate.name,
            *_scores(candidate.evaluation),
            gain_cell(candidate.gain),
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
    """Modelled time of batches, one row per placement; gains over the first.

    Between placements for different numbers of GPUs gains are those of a GPU's time:
    twice as many have to be twice as fast.
    """
    size = evaluations[0].batch_tokens
    title = (
        f"Batches of about {amount(size, 'token')}"
        if size
        else "All tokens as one batch"
    )
    held = evaluations[0].num_tokens / evaluations[0].batch_seconds.size
    if held < size / 2:  # decoding: no more sequences than these at once
        title = f"Batches of about {amount(round(held), 'token')}, at most {size:,}"
    table = plain_table(f"{title}, modelled (ms)")
    table.add_column("placement", overflow="fold")
    first, per_gpu = evaluations[0], differ_in_gpus(evaluations)
    heads = ("batches", "mean", "p95", "p99")
    own = (
        ("GPUs", "tokens/s\nper GPU", "gain\nper GPU") if per_gpu else ("gain in mean",)
    )
    for name in (*heads, *own):
        table.add_column(name, justify="right", no_wrap=True, vertical="bottom")
    for name, scores in zip(names, evaluations, strict=True):
        gain = (
            1 - _gpu_seconds(scores) / _gpu_seconds(first)
            if _gpu_seconds(first)
            else 0.0
        )
        alone = scores.batch_seconds.size < 2  # one batch has no percentiles
        table.add_row(
            name,
            str(scores.batch_seconds.size),
            number(scores.batch_seconds_mean * 1e3),
            "-" if alone else number(scores.batch_seconds_p95 * 1e3),
            "-" if alone else number(scores.batch_seconds_p99 * 1e3),
            *([str(scores.num_ranks), _throughput(scores)] if per_gpu else []),
            "-" if scores is first else percent(gain),
        )
    return table


def differ_in_gpus(evaluations: Sequence[Evaluation]) -> bool:
    """Whether the placements are for different numbers of GPUs."""
    return len({scores.num_ranks for scores in evaluations}) > 1


def _gpu_seconds(scores: Evaluation) -> float:
    return scores.batch_seconds_mean * scores.num_ranks


def _throughput(scores: Evaluation) -> str:
    return f"{scores.tokens_per_second_per_rank:,.0f}"


def stage_table(name: str, solution: Solution) -> Table:
    """What the solver claims of each of its stages, on the planning part."""
    table = plain_table("Solver, on the planning part")
    for head in ("stage", "minimises"):
        table.add_column(head, overflow="fold")
    for head in ("value", "lower\nbound", "gap", "seconds"):
        table.add_column(head, justify="right")
    table.add_column("status")
    for stage in solution.stages or ():
        table.add_row(
            stage.name,
            stage.objective.value,
            solved(stage.value),
            solved(stage.lower_bound),
            gap(stage.value, stage.lower_bound),
            f"{stage.seconds:.2f}",
            stage.status.value,
        )
    if not solution.stages:
        table.add_row(
            name,
            solution.objective.value,
            solved(solution.value),
            solved(solution.lower_bound),
            gap(solution.value, solution.lower_bound),
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
        "tokens": _tokens(description),
        "phases": _phases(description),
        "layers": f"{len(layers)}: {layers[0]}..{layers[-1]}{gaps}",
        "experts": f"{description.num_experts}, "
        + (f"top-{description.top_k}" if description.top_k else "top-k unknown"),
        "first expert known": "yes" if description.ranked else "no (no weights)",
        "unused experts": _unused(description),
        "busiest / mean expert": _range(description.load_skew),
        "co-activation lift": _range(description.coactivation_lift),
        "layer-to-layer lift": _range(description.transition_lift),
        "missing": ", ".join(description.missing) or "nothing",
    }
    for hint in description.hints:
        rows[f"hint {len(rows)}"] = hint
    for name, value in rows.items():
        table.add_row(
            name.partition(" ")[0] if name.startswith("hint") else name, value
        )
    return table


def _tokens(description: TraceDescription) -> str:
    groups = f"in {amount(description.num_sequences, 'sequence')}"
    if description.tokens_known:
        return f"{description.num_tokens:,} {groups}"
    return (
        f"unknown: {description.num_tokens:,} choices of experts a layer {groups}; "
        f"--top-k says how many a token has"
    )


def _phases(description: TraceDescription) -> str:
    """How many tokens were prefilled and decoded."""
    if description.decode_tokens is None:
        return "not told"
    return (
        f"{description.prefill_tokens:,} prefill, {description.decode_tokens:,} decode"
    )


def _unused(description: TraceDescription) -> str:
    """How many experts no token chose, in all and at the layers with the most."""
    pairs = len(description.layers) * description.num_experts
    per_layer = zip(description.layers, description.unused_per_layer, strict=True)
    worst = sorted(((n, layer) for layer, n in per_layer if n), key=lambda one: -one[0])
    if not worst:
        return "none"
    listed = ", ".join(f"{n} at layer {layer}" for n, layer in worst[:_MAX_LAYERS])
    more = ", ..." if len(worst) > _MAX_LAYERS else ""
    return f"{description.unused_experts:,} of {pairs:,}: {listed}{more}"


def plain_table(title: str | None = None) -> Table:
    """A table without columns yet, in the style of all others."""
    return Table(
        title=title,
        title_justify="left",
        box=box.SIMPLE_HEAD,
        padding=0,
        pad_edge=False,
        show_edge=False,
    )


def _score_table(first: str, title: str | None = None) -> Table:
    table = plain_table(title)
    table.add_column(first, overflow="fold", vertical="bottom")
    for name in _COLUMNS:
        table.add_column(name, justify="right", no_wrap=True)
    return table


def _scores(scores: Evaluation) -> tuple[str, ...]:
    return (
        number(scores.imbalance_mean),
        number(scores.imbalance_worst),
        number(scores.remote_ranks_per_token),
        number(scores.remote_nodes_per_token),
        number(scores.bottleneck_receive),
        number(scores.batch_seconds_mean * 1e3),
    )


def _range(values: Range | None) -> str:
    if values is None:
        return "unknown"
    return f"{values.median:.2f} (layers {values.low:.2f} to {values.high:.2f})"
