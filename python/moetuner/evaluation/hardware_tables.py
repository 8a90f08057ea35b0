"""Parts of a hardware file that are tables of numbers: curves, pairs, residuals."""

from __future__ import annotations

from typing import TYPE_CHECKING

from moetuner.evaluation.curves import (
    Calibration,
    GemmPoint,
    GroupedGemm,
    Permutation,
    Residual,
)
from moetuner.evaluation.other_ranks import OtherRanks
from moetuner.evaluation.pairs import Pairs, bandwidth_of_pairs, checked_pairs
from moetuner.evaluation.toml_table import Table
from moetuner.evaluation.units import Unit, quantity

if TYPE_CHECKING:
    from moetuner.evaluation.rates import Bandwidth


def pair_bandwidth(top: Table) -> Pairs:
    """Bandwidth from each rank to each; empty where nothing is said."""
    if not top.has("pairs"):
        return ()
    table = top.table("pairs")
    what = "a list of ranks, each a list of bandwidths to all ranks"
    rows = table.take("bandwidth", what)
    lists = isinstance(rows, list) and all(isinstance(row, list) for row in rows)
    if not lists or not rows:
        table.fail("bandwidth", f"wanted {what}, got {rows!r:.60}")

    def rate(g: int, h: int) -> float:
        own = quantity(rows[g][h], Unit.BANDWIDTH) if g == h else None
        key = f"bandwidth[{g}][{h}]"
        return table.as_number(key, rows[g][h], Unit.BANDWIDTH) if own is None else own

    rates = [[rate(g, h) for h in range(len(row))] for g, row in enumerate(rows)]
    return table.done(checked_pairs, value=rates, name="bandwidth")


def links_of_pairs(
    pairs: Pairs, ranks_per_node: int
) -> tuple[Bandwidth | None, Bandwidth | None]:
    """What links inside nodes, and between them, carry; None where pairs do not say."""
    ranks, members = len(pairs), min(ranks_per_node, len(pairs))
    if not ranks or ranks % members:
        return None, None
    near, far = (
        bandwidth_of_pairs(pairs, members, between_nodes=between) if told else None
        for between, told in ((False, members > 1), (True, ranks > members))
    )
    return near, far


def matmul_rates(rates: Table) -> dict[str, float | None]:
    """Operations/s by the names of their fields; None where a type has none."""
    return rates.done(
        dict,
        matmul_rate=rates.number("bf16", Unit.RATE),
        fp8_matmul_rate=maybe(rates, "fp8", Unit.RATE),
        fp4_matmul_rate=maybe(rates, "fp4", Unit.RATE),
    )


def maybe(table: Table, key: str, unit: Unit) -> float | None:
    """A quantity; None where nothing is said."""
    return table.number(key, unit) if table.has(key) else None


def other_ranks(table: Table) -> OtherRanks:
    """How some ranks compute."""
    told = table.has("matmul_rate")
    return table.done(
        OtherRanks,
        name=table.text("name"),
        ranks=_ranks(table),
        memory_bandwidth=maybe(table, "memory_bandwidth", Unit.BANDWIDTH),
        grouped_gemm=tuple(map(grouped_gemm, table.tables("grouped_gemm"))),
        **(matmul_rates(table.table("matmul_rate")) if told else {}),
    )


def _ranks(table: Table) -> tuple[int, ...]:
    ranks = table.take("ranks", "a list of ranks")
    if not isinstance(ranks, list):
        table.fail("ranks", f"wanted a list of ranks, got {ranks!r:.60}")
    return tuple(ranks)


def grouped_gemm(table: Table) -> GroupedGemm:
    """Measured times of experts of one shape."""
    points = []
    rows = table.take("points", "a list of [rows, active, seconds]")
    if not isinstance(rows, list):
        table.fail("points", f"wanted a list of [rows, active, seconds], got {rows!r}")
    for i, row in enumerate(rows):
        if not isinstance(row, list) or len(row) != 3:
            table.fail(f"points[{i}]", f"wanted [rows, active, seconds], got {row!r}")
        inner = Table(
            table.file,
            f"{table.place}points[{i}].",
            dict(zip(("rows", "active", "seconds"), row, strict=True)),
        )
        points.append(
            inner.done(
                GemmPoint,
                rows=inner.whole("rows"),
                active=inner.whole("active"),
                seconds=inner.number("seconds", Unit.TIME),
            )
        )
    weight_bytes = table.take("weight_bytes", "bytes of a weight", 2.0)
    return table.done(
        GroupedGemm,
        dtype=table.text("dtype"),
        hidden_size=table.whole("hidden_size"),
        expert_hidden_size=table.whole("expert_hidden_size"),
        num_projections=table.whole("num_projections", 3),
        weight_bytes=weight_bytes,
        points=tuple(points),
    )


def permutation(top: Table) -> Permutation | None:
    """Time to bring rows into order; None where nothing is said."""
    if not top.has("permutation"):
        return None
    table = top.table("permutation")
    return table.done(
        Permutation,
        per_row=table.number("per_row", Unit.TIME, 0.0),
        per_byte=table.number("per_byte", Unit.TIME_PER_BYTE, 0.0),
    )


def calibration(top: Table) -> Calibration | None:
    """Where, when and how figures were measured; None where nothing is said."""
    if not top.has("calibration"):
        return None
    table = top.table("calibration")
    residuals = [
        each.done(
            Residual,
            part=each.text("part"),
            points=each.whole("points"),
            median=each.take("median", "a relative error"),
            worst=each.take("worst", "a relative error"),
        )
        for each in table.tables("residuals")
    ]
    return table.done(
        Calibration,
        machine=table.text("machine"),
        date=table.text("date"),
        command=table.text("command"),
        residuals=tuple(residuals),
    )
