"""Load per rank and traffic between ranks, before and after, drawn by matplotlib."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from moetuner.errors import MissingDependencyError
from moetuner.report.quantities import relative_load, traffic_per_token

if TYPE_CHECKING:
    from moetuner.planning.scores import Scored

_MAX_LABELS = 16  # more ticks than this touch each other
_MAX_NUMBERS = 8  # more ranks than this leave no room for numbers in the cells


def new_figure() -> Any:
    """An empty figure that needs no display.

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
    return Figure(layout="constrained")


def plot_loads(figure: Any, axes: Any, pair: tuple[Scored, ...]) -> None:
    """Rank load over mean rank load, per layer; 1 is balance, and white."""
    loads = [relative_load(candidate.evaluation) for candidate in pair]
    low, high = min(map(np.min, loads)), max(map(np.max, loads))
    spread = max(high - 1, 1 - low, 0.01)
    for axis, candidate, load in zip(axes, pair, loads, strict=True):
        image = axis.imshow(
            load.T, cmap="PuOr_r", vmin=1 - spread, vmax=1 + spread, aspect="auto"
        )
        axis.set_title(
            f"{plain(candidate.name)}: load per rank\n"
            f"max/mean {candidate.evaluation.imbalance_mean:.2f} on average, "
            f"{candidate.evaluation.imbalance_worst:.2f} at worst"
        )
        axis.set_xlabel("layer")
        axis.set_ylabel("rank")
        layers = candidate.placement.layer_ids
        shown = range(0, len(layers), -(-len(layers) // _MAX_LABELS))
        axis.set_xticks(shown, [str(layers[i]) for i in shown])
        axis.set_yticks(_ticks(load.shape[1]))
    bar = figure.colorbar(image, ax=list(axes), label="load / mean load")
    if high > low:
        bar.ax.set_ylim(low, high)  # what there is: no load is negative


def plot_traffic(figure: Any, axes: Any, pair: tuple[Scored, ...]) -> None:
    """Dispatch rows per token from home to computing rank, mean over layers."""
    tables = [traffic_per_token(candidate.evaluation) for candidate in pair]
    most = max(np.nanmax(table) if len(table) > 1 else 0 for table in tables) or 1
    for axis, candidate, table in zip(axes, pair, tables, strict=True):
        image = axis.imshow(table, cmap="viridis", vmin=0, vmax=most)
        axis.set_facecolor("lightgray")
        axis.set_title(
            f"{plain(candidate.name)}: traffic (gray: stays on its rank)\n"
            f"{candidate.evaluation.remote_ranks_per_token:.2f} remote ranks per token"
        )
        axis.set_xlabel("computing rank")
        axis.set_ylabel("home rank")
        axis.set_xticks(_ticks(len(table)))
        axis.set_yticks(_ticks(len(table)))
        if len(table) <= _MAX_NUMBERS:
            _write_numbers(axis, table, most)
    figure.colorbar(image, ax=list(axes), label="rows per token of an even share")


def _write_numbers(axis: Any, table: Any, most: float) -> None:
    for (home, rank), value in np.ndenumerate(table):
        if np.isfinite(value):
            color = "black" if value > most / 2 else "white"
            axis.text(
                rank,
                home,
                f"{value:.2f}",
                color=color,
                ha="center",
                va="center",
                size=7,
            )


def _ticks(count: int) -> range:
    return range(0, count, -(-count // _MAX_LABELS))


def plain(name: str) -> str:
    """A name as it is: a dollar sign would begin a formula."""
    return name.replace("$", r"\$")
