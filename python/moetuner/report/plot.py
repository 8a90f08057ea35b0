"""Pictures of a plan: load per rank and traffic between ranks, before and after."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from moetuner._files import atomic_path
from moetuner.errors import MissingDependencyError

if TYPE_CHECKING:
    import os

    from moetuner.evaluate import Evaluation
    from moetuner.pipeline import PlanReport


def plot_plan(report: PlanReport, path: str | os.PathLike[str]) -> None:
    """Write a figure of baseline and result; the suffix tells PNG, SVG or PDF.

    Raises
    ------
    MissingDependencyError
        When matplotlib is not installed.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise MissingDependencyError(
            "plots need matplotlib: pip install 'moetuner[plot]'"
        ) from error
    pair = (report.baseline, report.result)
    evaluations = [candidate.evaluation for candidate in pair]
    figure = Figure(figsize=(10, 7.5), layout="constrained")
    figure.suptitle("Before and after, on held-out tokens")
    axes = figure.subplots(2, 2)
    _plot_loads(figure, axes[0], [c.name for c in pair], evaluations)
    _plot_traffic(figure, axes[1], [c.name for c in pair], evaluations)
    with atomic_path(path) as temporary:
        figure.savefig(temporary, dpi=150)


def _plot_loads(
    figure: Any, axes: Any, names: list[str], evaluations: list[Evaluation]
) -> None:
    """Rank load over mean rank load, per layer; 1 is balance."""
    loads = [e.rank_rows / e.rank_rows.mean(axis=1, keepdims=True) for e in evaluations]
    spread = max(abs(load - 1).max() for load in loads)
    for axis, name, load, evaluation in zip(
        axes, names, loads, evaluations, strict=True
    ):
        image = axis.imshow(
            load.T, cmap="PuOr_r", vmin=1 - spread, vmax=1 + spread, aspect="auto"
        )
        axis.set_title(
            f"{name}: load per rank, max/mean {evaluation.imbalance_mean:.2f}"
        )
        axis.set_xlabel("recorded MoE layer")
        axis.set_ylabel("rank")
        axis.set_yticks(range(load.shape[1]))
    figure.colorbar(image, ax=list(axes), label="load / mean load")


def _plot_traffic(
    figure: Any, axes: Any, names: list[str], evaluations: list[Evaluation]
) -> None:
    """Dispatch rows per token from home to computing rank, mean over layers."""
    rows = [
        e.traffic / e.num_tokens / len(e.imbalance) * len(e.traffic)
        for e in evaluations
    ]
    most = max(table.max() for table in rows)
    for axis, name, table, evaluation in zip(
        axes, names, rows, evaluations, strict=True
    ):
        image = axis.imshow(table, cmap="viridis", vmin=0, vmax=most)
        axis.set_title(
            f"{name}: traffic, "
            f"{evaluation.remote_ranks_per_token:.2f} remote ranks/token"
        )
        axis.set_xlabel("computing rank")
        axis.set_ylabel("home rank")
        axis.set_xticks(range(len(table)))
        axis.set_yticks(range(len(table)))
    figure.colorbar(image, ax=list(axes), label="rows per token of the home rank")
