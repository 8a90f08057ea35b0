"""Rich tables of plans, evaluations and traces."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rich.table import Table

if TYPE_CHECKING:
    from collections.abc import Sequence

    from moetuner.describe import Range, TraceDescription
    from moetuner.evaluate import Evaluation, GainInterval
    from moetuner.pipeline import PlanReport

_COLUMNS = (
    "load max/mean",
    "worst layer",
    "remote ranks/token",
    "remote nodes/token",
    "busiest receive",
    "modelled ms",
)


def plan_table(report: PlanReport) -> Table:
    """Baselines and result, scored on the held-out part."""
    table = _score_table("placement", title="Scores on held-out tokens")
    table.add_column("gain vs contiguous", justify="right")
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


def stage_table(report: PlanReport) -> Table:
    """What the solver claims of each of its stages, on the planning part."""
    table = Table(title="Solver, on the planning part", title_justify="left")
    for name in ("stage", "minimises"):
        table.add_column(name)
    for name in ("value", "lower bound", "gap", "seconds"):
        table.add_column(name, justify="right")
    table.add_column("status")
    solution = report.result.solution
    for stage in solution.stages or ():
        table.add_row(
            stage.name,
            stage.objective.value,
            f"{stage.value:.6g}",
            "-" if stage.lower_bound is None else f"{stage.lower_bound:.6g}",
            "-" if stage.gap is None else f"{stage.gap:.2%}",
            f"{stage.seconds:.2f}",
            stage.status.value,
        )
    if not solution.stages:
        table.add_row(
            report.result.name,
            solution.objective.value,
            f"{solution.value:.6g}",
            "-" if solution.lower_bound is None else f"{solution.lower_bound:.6g}",
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


def _score_table(first: str, title: str | None = None) -> Table:
    table = Table(title=title, title_justify="left")
    table.add_column(first)
    for name in _COLUMNS:
        table.add_column(name, justify="right")
    return table


def _scores(scores: Evaluation) -> tuple[str, ...]:
    return (
        f"{scores.imbalance_mean:.3f}",
        f"{scores.imbalance_worst:.3f}",
        _number(scores.remote_ranks_per_token),
        _number(scores.remote_nodes_per_token),
        f"{scores.bottleneck_receive:.3f}",
        f"{scores.modelled_seconds * 1e3:.3f}",
    )


def _number(value: float) -> str:
    return "unknown" if value != value else f"{value:.3f}"


def _gain(gain: GainInterval | None) -> str:
    if gain is None:
        return "-"
    return f"{gain.gain:+.1%} [{gain.low:+.1%}, {gain.high:+.1%}]"


def _range(values: Range | None) -> str:
    if values is None:
        return "unknown"
    return f"{values.median:.2f} (layers {values.low:.2f} to {values.high:.2f})"
