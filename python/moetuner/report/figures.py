"""The page's figures for a paper: PNG and SVG, drawn by matplotlib."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from moetuner._files import atomic_path
from moetuner.report.changes import changes_in
from moetuner.report.html.palette import AFTER, BEFORE, OTHER, PARTS
from moetuner.report.plot import new_figure, plain, plot_loads, plot_traffic
from moetuner.report.quantities import (
    FLOW_LEVELS,
    experts_by_rank,
    flow_levels,
    rank_flows,
    ranks_in_order,
    together,
)

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from moetuner.planning.scores import Comparison, Scored

SUFFIXES = (".png", ".svg")
_COLORS, _DASHES = (BEFORE.day, AFTER.day), ("--", "-")


def write_figures(comparison: Comparison, folder: Path) -> list[Path]:
    """Write every figure that the comparison has data for; returns the files.

    Raises
    ------
    MissingDependencyError
        When matplotlib is not installed.
    """
    written = []
    for name, draw in _FIGURES.items():
        figure = new_figure()
        if not draw(comparison, figure):
            continue
        for suffix in SUFFIXES:
            path = folder / f"{name}{suffix}"
            with atomic_path(path) as temporary:
                figure.savefig(temporary, dpi=200)
            written.append(path)
    return written


def _pair(comparison: Comparison) -> tuple[Scored, ...]:
    return (comparison.baseline, comparison.result)


def _gains(comparison: Comparison, figure: Any) -> bool:
    rows = [c for c in comparison.candidates if c.gain is not None]
    if not rows:
        return False
    figure.set_size_inches(6, 1 + 0.35 * len(rows))
    axis = figure.subplots()
    for i, scored in enumerate(rows):
        gain = scored.gain
        assert gain is not None
        ends = [[100 * (gain.gain - gain.low)], [100 * (gain.high - gain.gain)]]
        color = (AFTER if gain.certain and gain.gain > 0 else OTHER).day
        axis.errorbar(100 * gain.gain, i, xerr=ends, fmt="o", color=color, capsize=3)
    axis.axvline(0, color="black", linewidth=1)
    axis.set_yticks(range(len(rows)), [plain(c.name) for c in rows])
    axis.set_ylim(len(rows) - 0.5, -0.5)
    name = plain(comparison.baseline.name)
    axis.set_xlabel(f"gain in the mean batch over {name}, % (95% interval)")
    return True


def _load(comparison: Comparison, figure: Any) -> bool:
    figure.set_size_inches(10, 4)
    plot_loads(figure, figure.subplots(1, 2), _pair(comparison))
    return True


def _traffic(comparison: Comparison, figure: Any) -> bool:
    figure.set_size_inches(10, 4.5)
    plot_traffic(figure, figure.subplots(1, 2), _pair(comparison))
    return True


def _coactivation(comparison: Comparison, figure: Any) -> bool:
    """The layer that changed most, in the order of ranks; and all layers' shares."""
    counts = comparison.statistics.coactivation
    if counts is None:
        return False
    shares = [together(c.placement, counts) for c in _pair(comparison)]
    layer = int(np.abs(shares[1] - shares[0]).argmax())
    pairs = counts[layer] * (1000 / max(comparison.statistics.num_tokens, 1))
    np.fill_diagonal(pairs, np.nan)
    known = pairs[np.isfinite(pairs)]
    high = float(np.quantile(known, 0.995)) if known.size else 1.0
    figure.set_size_inches(12, 4)
    *maps, lines = figure.subplots(1, 3)
    for axis, scored in zip(maps, _pair(comparison), strict=True):
        order = experts_by_rank(scored.placement, layer)
        image = axis.imshow(pairs[np.ix_(order, order)], cmap="Blues", vmax=high or 1)
        axis.set_facecolor("lightgray")
        for start in np.flatnonzero(np.diff(ranks_in_order(scored.placement, layer))):
            axis.axhline(start + 0.5, color="gray", linewidth=0.4)
            axis.axvline(start + 0.5, color="gray", linewidth=0.4)
        number = comparison.statistics.layer_ids[layer]
        axis.set_title(f"{plain(scored.name)}, layer {number}")
        axis.set_xlabel("expert, in the order of ranks")
        axis.set_xticks([])
        axis.set_yticks([])
    figure.colorbar(image, ax=maps, label="pairs per 1,000 tokens", extend="max")
    for scored, share, color, dash in zip(
        _pair(comparison), shares, _COLORS, _DASHES, strict=True
    ):
        layers = comparison.statistics.layer_ids
        name = plain(scored.name)
        lines.plot(layers, 100 * share, color=color, linestyle=dash, label=name)
    lines.set_xlabel("layer")
    lines.set_ylabel("% of pairs on one rank")
    lines.legend()
    return True


def _flow(comparison: Comparison, figure: Any) -> bool:
    transitions = comparison.statistics.transitions
    if transitions is None or not len(transitions):
        return False
    figure.set_size_inches(10, 3.5)
    axes = figure.subplots(1, 2, sharey=True)
    layers = comparison.statistics.layer_ids[:-1]
    for axis, scored in zip(axes, _pair(comparison), strict=True):
        flows = rank_flows(scored.placement, transitions)
        base = np.zeros(len(layers))
        shares = flow_levels(scored.placement, flows)
        for level, share, ink in zip(FLOW_LEVELS, shares.T, PARTS, strict=True):
            axis.bar(layers, 100 * share, bottom=base, color=ink.day, label=level)
            base += 100 * share
        axis.set_title(plain(scored.name))
        axis.set_xlabel("from layer, to the next")
    axes[0].set_ylabel("% of the flow")
    handles, labels = axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=3)
    return True


def _convergence(comparison: Comparison, figure: Any) -> bool:
    points = comparison.result.placement.provenance.progress
    stages = list(dict.fromkeys(point.stage for point in points))
    if not stages:
        return False
    figure.set_size_inches(5 * len(stages), 3.5)
    axes = figure.subplots(1, len(stages), squeeze=False)[0]
    for axis, stage in zip(axes, stages, strict=True):
        own = [point for point in points if point.stage == stage]
        seconds = [point.seconds for point in own]
        for part, color, dash in zip(
            ("bound", "incumbent"), _COLORS, _DASHES, strict=True
        ):
            values = [getattr(point, part) for point in own]
            numbers = [np.nan if value is None else value for value in values]
            axis.step(
                seconds,
                numbers,
                where="post",
                color=color,
                linestyle=dash,
                marker=".",
                label=part,
            )
        axis.set_title(plain(stage))
        axis.set_xlabel("seconds")
    axes[0].set_ylabel("objective of the stage")
    axes[0].legend()
    return True


def _moves(comparison: Comparison, figure: Any) -> bool:
    before, after = _pair(comparison)
    moved = changes_in(comparison)
    if not moved.num_moved:
        return False
    figure.set_size_inches(6, 3.5)
    axis = figure.subplots()
    near, far = (
        moved.per_rank(between_nodes=kind) * (moved.expert_bytes / 1e9)
        for kind in (False, True)
    )
    ranks = range(moved.num_ranks)
    axis.bar(ranks, near, color=PARTS[1].day, label="from its own node")
    axis.bar(ranks, far, bottom=near, color=PARTS[0].day, label="from another node")
    axis.set_xlabel("rank")
    axis.set_ylabel("GB to fetch")
    axis.set_title(f"{plain(before.name)} to {plain(after.name)}")
    figure.legend(loc="outside lower center", ncols=2)
    return True


_FIGURES: dict[str, Callable[[Comparison, Any], bool]] = {
    "gains": _gains,
    "load": _load,
    "traffic": _traffic,
    "coactivation": _coactivation,
    "flow": _flow,
    "convergence": _convergence,
    "moves": _moves,
}
