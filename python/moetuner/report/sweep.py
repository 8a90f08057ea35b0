"""A sweep as a table, CSV, JSON and a plot."""

from __future__ import annotations

import csv
import dataclasses
import io
from typing import TYPE_CHECKING, Any

from moetuner._files import atomic_path, atomic_write_text
from moetuner._words import amount
from moetuner.report.plot import new_figure, plain
from moetuner.report.table import plain_table
from moetuner.report.words import percent

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from pathlib import Path

    from rich.table import Table

    from moetuner.planning.sweep import Cell, Setup, Sweep

LEGEND = """\
spare: slots beyond one per expert, all GPUs together; tokens, ms: of the mean
held-out batch, in the recorded MoE layers; tok/s a GPU: in these layers alone;
weights: of experts, on a GPU; load: fullest GPU / mean; gain: over the best
baseline of the cell (?: zero lies in its 95% interval)"""
_BEST = {
    "time": "best by time",
    "tokens_per_second": "best by tokens/s a GPU",
    "memory": "best by memory",
}
SUFFIXES = (".svg", ".png", ".pdf")
"""Of plots."""


def sweep_table(sweep: Sweep) -> Table:
    """One row for each cell; those that were not planned have dashes."""
    table = plain_table("Plans, scored on held-out tokens")
    for head in ("GPUs", "a\nnode", "slots", "spare"):
        table.add_column(head, justify="right", no_wrap=True)
    table.add_column("hardware", overflow="fold")
    for head in ("tokens", "ms", "tok/s\na GPU", "weights\n(GB)", "load", "gain"):
        table.add_column(head, justify="right", no_wrap=True)
    for cell in sweep.cells:
        table.add_row(*_row(cell))
    return table


def _row(cell: Cell) -> tuple[str, ...]:
    setup = cell.setup
    hardware = setup.pricing.cost.hardware.name
    if cell.comparison is None:
        spare = "-" if setup.slots_per_rank else str(setup.redundant)
        slots = str(setup.slots_per_rank or "-")
        return (str(setup.num_ranks), "-", slots, spare, hardware, *["-"] * 6)
    return (
        str(setup.num_ranks),
        str(cell.placement.topology.ranks_per_node),
        str(cell.placement.slots_per_rank),
        str(cell.redundant),
        hardware,
        f"{cell.batch_size:,.0f}",
        f"{cell.batch_seconds * 1e3:.4g}",
        _thousands(cell.tokens_per_second),
        f"{cell.weight_bytes / 1e9:.3g}",
        f"{cell.imbalance:.3f}",
        _gain(cell),
    )


def _thousands(value: float) -> str:
    for unit, size in (("M", 1e6), ("k", 1e3)):
        if value >= size:
            return f"{value / size:.4g}{unit}"
    return f"{value:.4g}"


def _gain(cell: Cell) -> str:
    rival = cell.scored.rival
    if rival is None or rival.gain is None:
        return "-"
    return f"{percent(rival.gain.gain)}{'' if rival.gain.certain else '?'}"


def best_lines(sweep: Sweep) -> list[str]:
    """The best cell by each measure, and what it has."""
    return [
        f"{_BEST[name]}: {_planned_name(cell)}: "
        f"{cell.batch_seconds * 1e3:.4g} ms for {cell.batch_size:,.0f} tokens, "
        f"{_thousands(cell.tokens_per_second)} tokens/s a GPU, "
        f"{cell.weight_bytes / 1e9:.3g} GB"
        for name, cell in sweep.best().items()
    ]


def lost_lines(sweep: Sweep) -> list[str]:
    """Cells whose plan is surely slower than a baseline."""
    lines = []
    for cell in sweep.planned:
        rival = cell.scored.rival
        if rival is not None and rival.gain is not None and rival.gain.high < 0:
            lines.append(
                f"{_planned_name(cell)}: {rival.name} takes {-rival.gain.gain:.1%} "
                f"less than the plan"
            )
    return lines


def not_planned(sweep: Sweep) -> dict[str, list[Cell]]:
    """Reasons, and the cells that each is about."""
    reasons: dict[str, list[Cell]] = {}
    for cell in sweep.cells:
        if cell.comparison is None:
            reasons.setdefault(cell.why_not, []).append(cell)
    return reasons


def cell_name(setup: Setup) -> str:
    """How a cell is called in words."""
    spare = f"{setup.redundant} spare"
    if setup.slots_per_rank:
        spare = amount(setup.slots_per_rank, "slot")
    gpus = amount(setup.num_ranks, "GPU")
    return f"{gpus}, {spare}, {setup.pricing.cost.hardware.name}"


def _planned_name(cell: Cell) -> str:
    """With the spare slots that there are: "just enough" may leave some."""
    return cell_name(dataclasses.replace(cell.setup, redundant=cell.redundant))


def cell_json(cell: Cell) -> dict[str, Any]:
    """A cell in plain numbers; None for what was not planned."""
    setup, known = cell.setup, cell.comparison is not None
    rival = cell.scored.rival if known else None
    gain = None if rival is None else rival.gain
    return {
        "ranks": setup.num_ranks,
        "ranks_per_node": setup.topology().ranks_per_node if known else None,
        "slots_per_rank": cell.placement.slots_per_rank
        if known
        else setup.slots_per_rank or None,
        "redundant": cell.redundant if known else setup.redundant,
        "hardware": setup.pricing.cost.hardware.name,
        "batch_tokens": setup.pricing.batch_tokens,
        "batch_size": cell.batch_size if known else None,
        "batches": cell.scored.result.evaluation.batch_seconds.size if known else None,
        "batch_seconds": cell.batch_seconds if known else None,
        "layer_seconds": cell.batch_seconds / cell.placement.num_layers
        if known
        else None,
        "tokens_per_second_per_gpu": cell.tokens_per_second if known else None,
        "weight_bytes_per_gpu": cell.weight_bytes if known else None,
        "imbalance": cell.imbalance if known else None,
        "best_baseline": None if rival is None else rival.name,
        "gain": None if gain is None else gain.gain,
        "gain_low": None if gain is None else float(gain.low),
        "gain_high": None if gain is None else float(gain.high),
        "held_out": cell.scored.held_out if known else None,
        "status": cell.placement.provenance.status if known else None,
        "why_not": cell.why_not or None,
    }


def sweep_json(sweep: Sweep) -> dict[str, Any]:
    """All cells, and the places of the best ones among them."""
    return {
        "cells": [cell_json(cell) for cell in sweep.cells],
        "best": {name: sweep.cells.index(cell) for name, cell in sweep.best().items()},
        "interrupted": sweep.interrupted,
    }


def write_csv(sweep: Sweep, path: Path) -> None:
    """One line for each cell, RFC 4180."""
    rows = [cell_json(cell) for cell in sweep.cells]
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, fieldnames=list(rows[0]))
    writer.writeheader()
    writer.writerows(rows)
    atomic_write_text(path, text.getvalue())


def write_plot(sweep: Sweep, path: Path) -> None:
    """Time, throughput and weights by number of GPUs; a line for each machine.

    Raises
    ------
    MissingDependencyError
        When matplotlib is not installed.
    """
    figure = new_figure()
    figure.set_size_inches(12, 4)
    axes = figure.subplots(1, 3)
    panels: tuple[tuple[str, Callable[[Cell], float]], ...] = (
        ("ms for a batch", lambda cell: cell.batch_seconds * 1e3),
        ("tokens/s a GPU", lambda cell: cell.tokens_per_second),
        ("GB of expert weights a GPU", lambda cell: cell.weight_bytes / 1e9),
    )
    for number, (name, cells) in enumerate(_lines(sweep.planned).items()):
        ranks = [cell.setup.num_ranks for cell in cells]
        for axis, (_, value) in zip(axes, panels, strict=True):
            axis.plot(
                ranks,
                [value(cell) for cell in cells],
                marker="osv^Dxp*"[number % 8],
                linestyle=("-", "--", ":", "-.")[number // 8 % 4],
                label=plain(name),
            )
    ticks = sorted({cell.setup.num_ranks for cell in sweep.planned})
    for axis, (name, _) in zip(axes, panels, strict=True):
        axis.set_xscale("log", base=2)
        axis.set_xticks(ticks, [str(tick) for tick in ticks])
        axis.set_ylim(bottom=0)
        axis.set_xlabel("GPUs")
        axis.set_ylabel(name)
    handles, labels = axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=4)
    with atomic_path(path) as temporary:
        figure.savefig(temporary, dpi=200)


def _lines(cells: Sequence[Cell]) -> dict[str, list[Cell]]:
    """Cells of one machine and one number of spare slots, by number of GPUs."""
    lines: dict[str, list[Cell]] = {}
    for cell in sorted(cells, key=lambda cell: cell.setup.num_ranks):
        one = dataclasses.replace(cell.setup, num_ranks=1)
        name = cell_name(one).partition(", ")[2]
        lines.setdefault(name, []).append(cell)
    return lines
