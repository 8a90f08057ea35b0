"""What a calibration found, as tables, and measured against fitted times as a plot."""

from __future__ import annotations

from itertools import cycle
from typing import TYPE_CHECKING, Any

from moetuner._files import atomic_path
from moetuner.report.html.palette import AFTER, BEFORE, OTHER, PARTS
from moetuner.report.plot import new_figure
from moetuner.report.table import plain_table

if TYPE_CHECKING:
    from pathlib import Path

    from rich.table import Table

    from moetuner.calibration.fit import Calibrated
    from moetuner.calibration.samples import Measurements
    from moetuner.evaluation.hardware import Hardware

_STYLES = tuple(
    (ink.day, mark)
    for ink, mark in zip((BEFORE, AFTER, *PARTS[1:], OTHER), "osD^v", strict=True)
)
"""Of parts, in the order in which they come."""
_MAX_WORST = 5  # cases listed; the measurements file has all


def figures_table(hardware: Hardware) -> Table:
    """The machine as it was fitted."""
    table = plain_table(f"{hardware.name}, as measured")
    for head in ("figure", "value"):
        table.add_column(head, overflow="fold")
    in_node = hardware.ranks_per_node
    ranks = "one rank" if in_node == 1 else f"{in_node} ranks"
    inside, between = hardware.inside, hardware.between(in_node)
    near = hardware.latency(in_node, between_nodes=False)
    far = hardware.latency(in_node, between_nodes=True)
    rows = {
        "memory of a rank": f"{hardware.memory_bandwidth / 1e9:.4g} GB/s",
        "arithmetic of a rank": f"{hardware.matmul_rate / 1e12:.4g} TFLOP/s",
        "link inside a node, out / in": _gigabytes(inside.egress, inside.ingress),
        "links of a node, out / in": _gigabytes(between.egress, between.ingress),
        f"latency of {ranks}, inside": f"{near * 1e6:.4g} us",
        f"latency of {ranks}, between": f"{far * 1e6:.4g} us",
        "experts of a layer, at least": f"{hardware.compute_floor * 1e6:.4g} us",
        "a layer besides": f"{hardware.layer_overhead * 1e6:.4g} us",
    }
    if (order := hardware.permutation) is not None:
        rows["a row into order"] = (
            f"{order.per_row * 1e9:.4g} ns and {order.per_byte * 1e12:.4g} ps a byte"
        )
    for name, value in rows.items():
        table.add_row(name, value)
    return table


def residual_table(found: Calibrated) -> Table:
    """How far the fitted times are from the measured ones, part by part."""
    table = plain_table("Fitted against measured times")
    table.add_column("part")
    for head in ("times", "median\nerror", "worst\nerror", "within\n15 %"):
        table.add_column(head, justify="right", no_wrap=True)
    calibration = found.hardware.calibration
    for each in calibration.residuals if calibration else ():
        own = [c for c in found.comparisons if each.part in (c.part, "all")]
        near = sum(abs(one.error) <= 0.15 for one in own)
        table.add_row(
            each.part,
            str(each.points),
            f"{each.median:.1%}",
            f"{each.worst:.1%}",
            f"{near / len(own):.0%}",
        )
    return table


def worst_table(found: Calibrated) -> Table:
    """The times that fit worst."""
    table = plain_table("Furthest off (ms)")
    table.add_column("part")
    table.add_column("of", overflow="fold")
    for head in ("measured", "spread", "fitted"):
        table.add_column(head, justify="right", no_wrap=True)
    worst = sorted(found.comparisons, key=lambda one: -abs(one.error))[:_MAX_WORST]
    for one in worst:
        times = (one.measured, one.spread, one.fitted)
        table.add_row(one.part, one.what, *(f"{value * 1e3:.4g}" for value in times))
    return table


def links_table(measured: Measurements) -> Table:
    """Plain messages and collectives: the smallest, and the rate of the largest."""
    table = plain_table("Communicator alone, not fitted")
    table.add_column("what")
    for head in (
        "smallest\n(bytes)",
        "takes\n(us)",
        "largest\n(bytes)",
        "GB/s of\na rank",
    ):
        table.add_column(head, justify="right", no_wrap=True)
    found: dict[str, list[tuple[int, float]]] = {}
    for link in measured.links:
        name = f"{link.direction.value} between {link.level.value}s"
        found.setdefault(name, []).append((link.num_bytes, link.timing.seconds))
    others = measured.topology.num_ranks - 1
    for each in measured.collectives:
        size = each.num_bytes * others
        found.setdefault(each.collective.value, []).append((size, each.timing.seconds))
    for name, times in found.items():
        (least, shortest), (most, longest) = min(times), max(times)
        table.add_row(
            name,
            f"{least:,}",
            f"{shortest * 1e6:.4g}",
            f"{most:,}",
            f"{most / longest / 1e9:.4g}",
        )
    return table


def write_plot(found: Calibrated, path: Path) -> None:
    """Measured against fitted times of all parts, and the curve of experts.

    Raises
    ------
    MissingDependencyError
        When matplotlib is not installed.
    """
    figure = new_figure()
    figure.set_size_inches(11, 4.5)
    left, right = figure.subplots(1, 2)
    _plot_times(left, found)
    _plot_experts(right, found.hardware)
    with atomic_path(path) as temporary:
        figure.savefig(temporary, dpi=150)


def _plot_times(axis: Any, found: Calibrated) -> None:
    parts = dict.fromkeys(c.part for c in found.comparisons)
    for part, (color, mark) in zip(parts, _STYLES, strict=False):
        own = [c for c in found.comparisons if c.part == part]
        axis.errorbar(
            [c.measured * 1e3 for c in own],
            [max(c.fitted, 1e-9) * 1e3 for c in own],
            xerr=[c.spread * 5e2 for c in own],
            fmt=mark,
            markersize=3.5,
            linewidth=0.5,
            color=color,
            label=part,
        )
    times = [c.measured * 1e3 for c in found.comparisons]
    ends = [min(times), max(times)]
    axis.plot(ends, ends, color="black", linewidth=1)
    low, high = ([factor * end for end in ends] for factor in (0.85, 1.15))
    axis.fill_between(ends, low, high, color="lightgray", label="within 15 %")
    axis.set_xscale("log")
    axis.set_yscale("log")
    axis.set_xlabel("measured (ms), with half the interquartile range each way")
    axis.set_ylabel("fitted (ms)")
    axis.legend(fontsize="small")


def _plot_experts(axis: Any, hardware: Hardware) -> None:
    for gemm, dash in zip(
        hardware.grouped_gemm, cycle(("-", "--", ":", "-.")), strict=False
    ):
        size = f"{gemm.hidden_size} x {gemm.expert_hidden_size}"
        counts = sorted({point.active for point in gemm.points})
        for number, active in enumerate(counts):
            own = [p for p in gemm.points if p.active == active]
            axis.plot(
                [p.rows for p in own],
                [p.seconds * 1e3 for p in own],
                dash,
                marker=".",
                color=f"C{number}",
                label=f"{active} active, {size}",
            )
    axis.set_xscale("log")
    axis.set_yscale("log")
    axis.set_xlabel("rows of all experts of a rank")
    axis.set_ylabel("experts (ms)")
    if hardware.grouped_gemm:
        axis.legend(fontsize="x-small")


def _gigabytes(egress: tuple[float, ...], ingress: tuple[float, ...]) -> str:
    return f"{min(egress) / 1e9:.4g} / {min(ingress) / 1e9:.4g} GB/s"
