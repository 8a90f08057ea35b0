"""Hardware and network files: TOML, read and written; docs/hardware.md has it."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from moetuner._files import atomic_write_text
from moetuner.errors import InvalidProblemError
from moetuner.evaluation.curves import (
    Calibration,
    GemmPoint,
    GroupedGemm,
    Permutation,
    Residual,
)
from moetuner.evaluation.hardware import (
    HARDWARE,
    NETWORKS,
    Hardware,
    LinkOf,
    Network,
)
from moetuner.evaluation.rates import Bandwidth, Latency
from moetuner.evaluation.toml_table import Table, read_toml
from moetuner.evaluation.toml_text import toml_text
from moetuner.evaluation.units import Unit

if TYPE_CHECKING:
    import os

Kind = TypeVar("Kind", Hardware, Network)

VERSION = 1
FORMATS: dict[type, str] = {
    Hardware: "moetuner.hardware",
    Network: "moetuner.network",
}


def read_hardware(path: str | os.PathLike[str]) -> Hardware:
    """Read a hardware file.

    Raises
    ------
    OSError
        When the file cannot be read.
    InvalidProblemError
        When it breaks the format: the message names the file, the key, what was wanted
        and what is there.
    """
    return read_file(Path(path), Hardware)


def read_network(path: str | os.PathLike[str]) -> Network:
    """Read a network file; errors as `read_hardware`."""
    return read_file(Path(path), Network)


def find_hardware(name: str) -> Hardware:
    """The known machine of that name, or what the file of that path says.

    Raises
    ------
    OSError, InvalidProblemError
        As `read_hardware`; and when `name` is neither.
    """
    return _find(name, HARDWARE, Hardware)


def find_network(name: str) -> Network:
    """The known network of that name, or what the file of that path says."""
    return _find(name, NETWORKS, Network)


def _find(name: str, known: Any, kind: type[Kind]) -> Kind:
    if name in known:
        found: Kind = known[name]
        return found
    path = Path(name)
    if not name or not (path.suffix == ".toml" or path.exists()):
        raise InvalidProblemError(
            f"`{kind.__name__.lower()}` must be one of {', '.join(known)}, or a file "
            f"(.toml), got {name!r}"
        )
    return read_file(path, kind)


def read_file(path: Path, kind: type[Kind]) -> Kind:
    """Read a file of `kind`."""
    top = Table(str(path), "", read_toml(path))
    wanted = FORMATS[kind]
    if top.take("format", f'"{wanted}"') != wanted:
        raise InvalidProblemError(f'{path}: format: wanted "{wanted}"')
    version = top.take("version", str(VERSION))
    if version != VERSION or isinstance(version, bool):
        top.fail("version", f"this moetuner reads version {VERSION}, got {version!r}")
    found: Any = _hardware(top) if kind is Hardware else _network_file(top)
    result: Kind = found
    return result


def _network_file(top: Table) -> Network:
    return top.done(
        Network, name=top.text("name"), sources=top.texts("sources"), **_network(top)
    )


def _network(table: Table) -> dict[str, Any]:
    link_of = table.text("link_of", LinkOf.RANK.value)
    if link_of not in [each.value for each in LinkOf]:
        table.fail("link_of", f"wanted rank or node, got {link_of!r:.60}")
    return {
        "link_of": LinkOf(link_of),
        "bandwidth": _bandwidth(table),
        "latency": _latency(table),
    }


def _hardware(top: Table) -> Hardware:
    rates = top.table("matmul_rate")
    inside = top.table("inside")
    fields = {
        "name": top.text("name"),
        "sources": top.texts("sources"),
        "ranks_per_node": top.whole("ranks_per_node"),
        "memory_bandwidth": top.number("memory_bandwidth", Unit.BANDWIDTH),
        "layer_overhead": top.number("layer_overhead", Unit.TIME, 0.0),
        **rates.done(
            dict,
            matmul_rate=rates.number("bf16", Unit.RATE),
            fp8_matmul_rate=_maybe_rate(rates, "fp8"),
            fp4_matmul_rate=_maybe_rate(rates, "fp4"),
        ),
        **inside.done(
            dict, rank_bandwidth=_bandwidth(inside), rank_latency=_latency(inside)
        ),
        **_between(top),
        "grouped_gemm": tuple(map(_grouped_gemm, top.tables("grouped_gemm"))),
        "permutation": _permutation(top),
        "calibration": _calibration(top),
    }
    return top.done(Hardware, **fields)


def _between(top: Table) -> dict[str, Any]:
    """A table, or the name of a known network."""
    name = top.take("between", "a table, or the name of a network")
    if isinstance(name, str):
        if name not in NETWORKS:
            top.fail(
                "between",
                f"wanted a table, or one of {', '.join(NETWORKS)}, got {name!r:.60}",
            )
        known = NETWORKS[name]
        bandwidth, latency, link_of = known.bandwidth, known.latency, known.link_of
        own = ""
    else:
        if not isinstance(name, dict):
            top.fail("between", f"wanted a table, got {name!r:.60}")
        table = Table(top.file, "between.", name)
        own = table.text("name", "")
        found = table.done(Network, name=own, **_network(table))
        bandwidth, latency, link_of = found.bandwidth, found.latency, found.link_of
    return {
        "nic_bandwidth": bandwidth,
        "node_latency": latency,
        "nic_of": link_of,
        "network": own,
    }


def _maybe_rate(table: Table, key: str) -> float | None:
    return table.number(key, Unit.RATE) if table.has(key) else None


def _bandwidth(table: Table) -> Bandwidth:
    return Bandwidth(
        egress=table.numbers("egress", Unit.BANDWIDTH),
        ingress=table.numbers("ingress", Unit.BANDWIDTH),
    )


def _latency(table: Table) -> Latency:
    inner = table.table("latency")
    base = inner.number("base", Unit.TIME)
    per_rank = inner.number("per_rank", Unit.TIME, 0.0)
    inner.done(dict)
    return Latency(base=base, per_rank=per_rank)


def _grouped_gemm(table: Table) -> GroupedGemm:
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


def _permutation(top: Table) -> Permutation | None:
    if not top.has("permutation"):
        return None
    table = top.table("permutation")
    return table.done(
        Permutation,
        per_row=table.number("per_row", Unit.TIME, 0.0),
        per_byte=table.number("per_byte", Unit.TIME_PER_BYTE, 0.0),
    )


def _calibration(top: Table) -> Calibration | None:
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


def write_hardware(hardware: Hardware, path: str | os.PathLike[str]) -> None:
    """Write a hardware file: all of it, or nothing. `read_hardware` gives it back."""
    atomic_write_text(path, hardware_text(hardware))


def hardware_text(hardware: Hardware) -> str:
    """What `write_hardware` writes."""
    values: dict[str, Any] = {
        "format": FORMATS[Hardware],
        "version": VERSION,
        "name": hardware.name,
        "sources": list(hardware.sources),
        "ranks_per_node": hardware.ranks_per_node,
        "memory_bandwidth": float(hardware.memory_bandwidth),
        "layer_overhead": float(hardware.layer_overhead),
        "matmul_rate": {
            "bf16": float(hardware.matmul_rate),
            "fp8": hardware.fp8_matmul_rate,
            "fp4": hardware.fp4_matmul_rate,
        },
        "inside": _link(hardware.rank_bandwidth, hardware.rank_latency),
        "between": {
            "name": hardware.network or None,
            "link_of": hardware.nic_of.value,
            **_link(hardware.nic_bandwidth, hardware.node_latency),
        },
    }
    if hardware.permutation is not None:
        values["permutation"] = {
            "per_row": float(hardware.permutation.per_row),
            "per_byte": float(hardware.permutation.per_byte),
        }
    if hardware.calibration is not None:
        values["calibration"] = _plain(hardware.calibration)
    if hardware.grouped_gemm:
        values["grouped_gemm"] = [
            {
                **_plain(each),
                "points": [[p.rows, p.active, float(p.seconds)] for p in each.points],
            }
            for each in hardware.grouped_gemm
        ]
    return toml_text(values)


def _plain(value: Any) -> dict[str, Any]:
    from moetuner._plain import to_plain

    found: dict[str, Any] = to_plain(value)
    return found


def _link(bandwidth: Bandwidth | float, latency: Latency | float) -> dict[str, Any]:
    values = Bandwidth.of(bandwidth, "bandwidth")
    start = Latency.of(latency, "latency")
    return {
        "egress": _one_or_list(values.egress),
        "ingress": _one_or_list(values.ingress),
        "latency": {"base": float(start.base), "per_rank": float(start.per_rank)},
    }


def _one_or_list(values: tuple[float, ...]) -> float | list[float]:
    plain = [float(value) for value in values]
    return plain[0] if len(plain) == 1 else plain
