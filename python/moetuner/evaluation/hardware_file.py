"""Hardware and network files: TOML, read and written; docs/hardware.md has it."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from moetuner._files import atomic_write_text
from moetuner.errors import InvalidProblemError
from moetuner.evaluation.hardware import (
    HARDWARE,
    NETWORKS,
    Hardware,
    LinkOf,
    Network,
)
from moetuner.evaluation.hardware_tables import (
    calibration,
    grouped_gemm,
    links_of_pairs,
    matmul_rates,
    other_ranks,
    pair_bandwidth,
    permutation,
)
from moetuner.evaluation.rates import Bandwidth, Latency
from moetuner.evaluation.toml_table import Table, read_toml
from moetuner.evaluation.toml_text import toml_text
from moetuner.evaluation.units import Unit, wanted

if TYPE_CHECKING:
    import os

    from moetuner.evaluation.curves import GroupedGemm
    from moetuner.evaluation.other_ranks import OtherRanks

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


def find_hardware(name: str, *, argument: str = "hardware") -> Hardware:
    """The known machine of that name, or what the file of that path says.

    Parameters
    ----------
    name
        In any case, or a path.
    argument
        What the caller calls it, for errors.

    Raises
    ------
    OSError, InvalidProblemError
        As `read_hardware`; and when `name` is neither.
    """
    return _find(name, HARDWARE, Hardware, argument)


def find_network(name: str) -> Network:
    """The known network of that name, or what the file of that path says."""
    return _find(name, NETWORKS, Network, "network")


def _find(name: str, known: Any, kind: type[Kind], argument: str) -> Kind:
    if name.lower() in known:
        found: Kind = known[name.lower()]
        return found
    path = Path(name)
    if not name or not (path.suffix == ".toml" or path.exists()):
        other = Network if kind is Hardware else Hardware
        others = NETWORKS if kind is Hardware else HARDWARE
        raise InvalidProblemError(
            f"`{argument}` must be one of {', '.join(known)}, or a file "
            f"(.toml), got {name!r}"
            + f", which is for `{other.__name__.lower()}`"
            * (name.lower() in others)
        )
    return read_file(path, kind)


def read_file(path: Path, kind: type[Kind]) -> Kind:
    """Read a file of `kind`."""
    top = Table(str(path), "", read_toml(path))
    known = FORMATS[kind]
    if top.take("format", f'"{known}"') != known:
        raise InvalidProblemError(f'{path}: format: wanted "{known}"')
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


def _network(table: Table, of_pairs: Bandwidth | None = None) -> dict[str, Any]:
    link_of = table.text("link_of", LinkOf.RANK.value)
    if link_of not in [each.value for each in LinkOf]:
        table.fail("link_of", f"wanted rank or node, got {link_of!r:.60}")
    return {
        "link_of": LinkOf(link_of),
        "bandwidth": _bandwidth(table, of_pairs),
        "latency": _latency(table),
    }


def _hardware(top: Table) -> Hardware:
    rates = top.table("matmul_rate")
    inside = top.table("inside")
    pairs, ranks_per_node = pair_bandwidth(top), top.whole("ranks_per_node")
    near, far = links_of_pairs(pairs, ranks_per_node)
    fields = {
        "name": top.text("name"),
        "sources": top.texts("sources"),
        "ranks_per_node": ranks_per_node,
        "pair_bandwidth": pairs,
        "memory_bandwidth": top.number("memory_bandwidth", Unit.BANDWIDTH),
        "layer_overhead": top.number("layer_overhead", Unit.TIME, 0.0),
        "compute_floor": top.number("compute_floor", Unit.TIME, 0.0),
        **matmul_rates(rates),
        **inside.done(
            dict, rank_bandwidth=_bandwidth(inside, near), rank_latency=_latency(inside)
        ),
        **_between(top, far),
        "grouped_gemm": tuple(map(grouped_gemm, top.tables("grouped_gemm"))),
        "other_ranks": tuple(map(other_ranks, top.tables("other_ranks"))),
        "permutation": permutation(top),
        "calibration": calibration(top),
    }
    return top.done(Hardware, **fields)


def _between(top: Table, of_pairs: Bandwidth | None) -> dict[str, Any]:
    """A table, or the name of a known network."""
    name = top.take("between", "a table, or the name of a network")
    if isinstance(name, str):
        if name not in NETWORKS:
            top.fail(
                "between",
                f"wanted a table, or one of {', '.join(NETWORKS)}, got {name!r:.60}",
            )
        if of_pairs is not None:
            top.fail(
                "between",
                f"wanted a table, or no [pairs]: they say what joins nodes, so {name} "
                f"cannot",
            )
        known = NETWORKS[name]
        bandwidth, latency, link_of = known.bandwidth, known.latency, known.link_of
        own = ""
    else:
        if not isinstance(name, dict):
            top.fail("between", f"wanted a table, got {name!r:.60}")
        table = Table(top.file, "between.", name)
        own = table.text("name", "")
        found = table.done(Network, name=own, **_network(table, of_pairs))
        bandwidth, latency, link_of = found.bandwidth, found.latency, found.link_of
    return {
        "nic_bandwidth": bandwidth,
        "node_latency": latency,
        "nic_of": link_of,
        "network": own,
    }


def _bandwidth(table: Table, of_pairs: Bandwidth | None) -> Bandwidth:
    """As the table says; where it says nothing, as pairs of ranks do."""
    if of_pairs is not None and not (table.has("egress") or table.has("ingress")):
        return of_pairs
    return Bandwidth(
        egress=table.numbers("egress", Unit.BANDWIDTH),
        ingress=table.numbers("ingress", Unit.BANDWIDTH),
    )


def _latency(table: Table) -> Latency:
    what = f"{wanted(Unit.TIME)}, or a table of base and per_rank"
    value = table.take("latency", what)
    if not isinstance(value, dict):  # the same for any number of ranks
        return Latency(base=table.as_number("latency", value, Unit.TIME, what))
    inner = Table(table.file, f"{table.place}latency.", value)
    base = inner.number("base", Unit.TIME)
    per_rank = inner.number("per_rank", Unit.TIME, 0.0)
    inner.done(dict)
    return Latency(base=base, per_rank=per_rank)


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
        "compute_floor": float(hardware.compute_floor),
        "matmul_rate": _rates_table(hardware),
        "inside": _link(hardware.rank_bandwidth, hardware.rank_latency),
        "between": {
            "name": hardware.network or None,
            "link_of": hardware.nic_of.value,
            **_link(hardware.nic_bandwidth, hardware.node_latency),
        },
    }
    if hardware.pair_bandwidth:
        rows = [list(map(float, row)) for row in hardware.pair_bandwidth]
        values["pairs"] = {"bandwidth": rows}
    if hardware.permutation is not None:
        values["permutation"] = {
            "per_row": float(hardware.permutation.per_row),
            "per_byte": float(hardware.permutation.per_byte),
        }
    if hardware.calibration is not None:
        values["calibration"] = _plain(hardware.calibration)
    if hardware.grouped_gemm:
        values["grouped_gemm"] = [_gemm_table(each) for each in hardware.grouped_gemm]
    if hardware.other_ranks:
        values["other_ranks"] = [_others_table(each) for each in hardware.other_ranks]
    return toml_text(values)


def _rates_table(of: Hardware | OtherRanks) -> dict[str, Any]:
    rates = (of.matmul_rate, of.fp8_matmul_rate, of.fp4_matmul_rate)
    named = zip(("bf16", "fp8", "fp4"), rates, strict=True)
    return {name: None if rate is None else float(rate) for name, rate in named}


def _gemm_table(curve: GroupedGemm) -> dict[str, Any]:
    points = [[p.rows, p.active, float(p.seconds)] for p in curve.points]
    return {**_plain(curve), "points": points}


def _others_table(of: OtherRanks) -> dict[str, Any]:
    memory = of.memory_bandwidth
    found: dict[str, Any] = {
        "name": of.name,
        "ranks": list(of.ranks),
        "memory_bandwidth": None if memory is None else float(memory),
    }
    if of.matmul_rate is not None:
        found["matmul_rate"] = _rates_table(of)
    if of.grouped_gemm:
        found["grouped_gemm"] = [_gemm_table(each) for each in of.grouped_gemm]
    return found


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
