"""Tables of machines and networks."""

from __future__ import annotations

from typing import TYPE_CHECKING

from moetuner.evaluation.rates import Bandwidth, Latency
from moetuner.report.table import plain_table

if TYPE_CHECKING:
    from collections.abc import Sequence

    from rich.table import Table

    from moetuner.evaluation.hardware import Hardware, Network


def hardware_table(machines: Sequence[Hardware]) -> Table:
    """Ranks of a node, rates and links of each machine."""
    table = plain_table("hardware")
    table.add_column("name")
    for name in ("ranks", "memory", "bf16", "fp8", "fp4", "in a node", "nodes"):
        table.add_column(f" {name}", justify="right", no_wrap=True)
    for each in machines:
        rates = (each.matmul_rate, each.fp8_matmul_rate, each.fp4_matmul_rate)
        table.add_row(
            each.name,
            str(each.ranks_per_node),
            _giga(each.memory_bandwidth),
            *("-" if rate is None else f"{rate / 1e12:,.0f}" for rate in rates),
            _bandwidth(each.rank_bandwidth),
            f"{_bandwidth(each.nic_bandwidth)} a {each.nic_of.value}",
        )
    table.caption = "memory and links in GB/s each way, arithmetic in TFLOP/s"
    table.caption_justify = "left"
    return table


def network_table(networks: Sequence[Network]) -> Table:
    """Bandwidth and latency of each network."""
    table = plain_table("networks")
    table.add_column("name")
    for name in ("GB/s each way", "latency (us)"):
        table.add_column(f" {name}", justify="right", no_wrap=True)
    for each in networks:
        latency = Latency.of(each.latency, "latency")
        table.add_row(
            each.name,
            f"{_bandwidth(each.bandwidth)} a {each.link_of.value}",
            f"{latency.base * 1e6:.4g}",
        )
    return table


def _bandwidth(given: Bandwidth | float) -> str:
    values = Bandwidth.of(given, "bandwidth")
    low = values.slowest
    high = max(*values.egress, *values.ingress)
    return _giga(low) if low == high else f"{_giga(low)}-{_giga(high)}"


def _giga(value: float) -> str:
    return f"{value / 1e9:.4g}"
