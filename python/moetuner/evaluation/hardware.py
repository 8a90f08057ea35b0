"""What a machine can do: how fast its ranks compute and what joins them.

Known machines and networks are files in moetuner/data, each number with its source;
docs/hardware.md has the format.
"""

from __future__ import annotations

import enum
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Generic, TypeVar

from moetuner._checks import check_positive, is_whole, one_of
from moetuner.errors import InvalidProblemError
from moetuner.evaluation.curves import (  # noqa: TC001 - provenance reads the types
    Calibration,
    GroupedGemm,
    Permutation,
)
from moetuner.evaluation.other_ranks import OtherRanks, checked_others
from moetuner.evaluation.pairs import Pairs, checked_pairs
from moetuner.evaluation.rates import Bandwidth, Latency, check_seconds

MAX_RANKS_PER_NODE = 4096


class Dtype(str, enum.Enum):
    """What matrices are multiplied in."""

    FP32 = "fp32"
    BF16 = "bf16"
    FP8 = "fp8"
    FP4 = "fp4"


class LinkOf(str, enum.Enum):
    """Whose bandwidth a network's figures are."""

    RANK = "rank"
    """Of each rank's network card; a node has as many as it has ranks."""
    NODE = "node"
    """Of a whole node."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Network:
    """What joins nodes.

    Parameters
    ----------
    name, sources
        What it is called, and where the figures are from.
    bandwidth
        Bytes/s each way; one value, or one per node.
    latency
        Of an exchange in which a row leaves its node, s.
    link_of
        Whether ``bandwidth`` is of each rank's network card or of a whole node.
    """

    name: str
    bandwidth: Bandwidth | float
    latency: Latency | float
    link_of: LinkOf = LinkOf.RANK
    sources: tuple[str, ...] = field(default=(), compare=False)

    def __post_init__(self) -> None:
        _check_named("Network", self)
        link_of = one_of(LinkOf, self.link_of, "Network: link_of")
        object.__setattr__(self, "link_of", link_of)
        bandwidth = Bandwidth.of(self.bandwidth, "Network: bandwidth")
        object.__setattr__(self, "bandwidth", bandwidth.plain)
        latency = Latency.of(self.latency, "Network: latency")
        object.__setattr__(self, "latency", latency.plain)


@dataclass(frozen=True, kw_only=True, slots=True)
class Hardware:
    """Nodes of one kind: what their ranks (GPUs) compute, and what joins them.

    Parameters
    ----------
    name, sources
        What it is called, and where the figures are from.
    ranks_per_node
        Ranks that the link inside a node joins.
    memory_bandwidth
        Of a rank, bytes/s.
    matmul_rate, fp8_matmul_rate, fp4_matmul_rate
        Operations/s of a rank, dense; the first in bf16. None: as the next wider type.
    rank_bandwidth
        Of a rank's link inside its node, bytes/s; a number for both ways, or a
        `Bandwidth`, whose values are one, one per rank of a node, or one per rank.
    nic_bandwidth
        Of what joins nodes, bytes/s; a number, or a `Bandwidth` of one value or one per
        node. ``nic_of`` says whether it is of each rank's card or of a whole node.
    rank_latency, node_latency
        Of an exchange, s: without and with a row that leaves its node; a number, or a
        `Latency` that grows with the ranks.
    network
        How what joins the nodes is called, where it is not the machine's own.
    grouped_gemm
        Measured times of a rank's experts; empty: the larger of arithmetic and memory.
    permutation
        Measured time to bring rows into the order of experts; None: nothing.
    layer_overhead
        What a layer takes besides, s: launches.
    compute_floor
        What the slowest rank's experts take at least, s, beside ``layer_overhead`` and
        the start of their curve: a host that launches small ones keeps its GPU waiting.
    other_ranks
        Ranks that compute otherwise than ``memory_bandwidth``, the matmul rates and
        ``grouped_gemm`` say.
    pair_bandwidth
        From each rank to each, [G, G] bytes/s, 0 on the diagonal: what the seconds of
        the slowest pair are made of. Empty: the slower end of the two links.
    calibration
        Where, when and how the figures were measured.

    Raises
    ------
    InvalidProblemError
        When a figure is not positive, a latency is negative, or ``pair_bandwidth`` is
        not square.
    """

    name: str
    memory_bandwidth: float
    matmul_rate: float
    rank_bandwidth: Bandwidth | float
    nic_bandwidth: Bandwidth | float
    rank_latency: Latency | float
    node_latency: Latency | float
    fp8_matmul_rate: float | None = None
    fp4_matmul_rate: float | None = None
    ranks_per_node: int = 8
    nic_of: LinkOf = LinkOf.RANK
    network: str = ""
    grouped_gemm: tuple[GroupedGemm, ...] = ()
    permutation: Permutation | None = None
    layer_overhead: float = 0.0
    compute_floor: float = 0.0
    other_ranks: tuple[OtherRanks, ...] = ()
    pair_bandwidth: Pairs = ()
    sources: tuple[str, ...] = field(default=(), compare=False)
    calibration: Calibration | None = field(default=None, compare=False)

    def __post_init__(self) -> None:
        _check_named("Hardware", self)
        for name in ("memory_bandwidth", "matmul_rate"):
            check_positive("Hardware", name, getattr(self, name))
        for name in ("fp8_matmul_rate", "fp4_matmul_rate"):
            if getattr(self, name) is not None:
                check_positive("Hardware", name, getattr(self, name))
        for name in ("rank_bandwidth", "nic_bandwidth"):
            bandwidth = Bandwidth.of(getattr(self, name), f"Hardware: {name}")
            object.__setattr__(self, name, bandwidth.plain)
        for name in ("rank_latency", "node_latency"):
            latency = Latency.of(getattr(self, name), f"Hardware: {name}")
            object.__setattr__(self, name, latency.plain)
        for name in ("layer_overhead", "compute_floor"):
            check_seconds(f"Hardware: {name}", getattr(self, name))
        others = checked_others(self.other_ranks)
        object.__setattr__(self, "other_ranks", others)
        pairs = checked_pairs(self.pair_bandwidth, "Hardware: pair_bandwidth")
        object.__setattr__(self, "pair_bandwidth", pairs)
        nic_of = one_of(LinkOf, self.nic_of, "Hardware: nic_of")
        object.__setattr__(self, "nic_of", nic_of)
        object.__setattr__(self, "grouped_gemm", tuple(self.grouped_gemm))
        most = MAX_RANKS_PER_NODE
        if not is_whole(self.ranks_per_node) or not 0 < self.ranks_per_node <= most:
            raise InvalidProblemError(
                f"Hardware: ranks_per_node must be a whole number from 1 to {most}, "
                f"got {self.ranks_per_node!r}"
            )

    @property
    def inside(self) -> Bandwidth:
        """``rank_bandwidth``, spelt out."""
        return Bandwidth.of(self.rank_bandwidth, "Hardware: rank_bandwidth")

    def between(self, ranks_per_node: int) -> Bandwidth:
        """Bandwidth of whole nodes of so many ranks; one value, or one per node."""
        given = Bandwidth.of(self.nic_bandwidth, "Hardware: nic_bandwidth")
        return given.times(ranks_per_node) if self.nic_of is LinkOf.RANK else given

    def latency(self, num_ranks: int, *, between_nodes: bool) -> float:
        """Of an exchange among so many ranks, s."""
        given = self.node_latency if between_nodes else self.rank_latency
        return Latency.of(given, "Hardware: latency").seconds(num_ranks)

    def rate(self, dtype: Dtype) -> float:
        """Operations/s in `dtype`, or in the next wider type that the ranks have.

        There is no rate of float32: it is the one of bf16.
        """
        rate = self.matmul_rate
        for narrower, known in (
            (Dtype.FP8, self.fp8_matmul_rate),
            (Dtype.FP4, self.fp4_matmul_rate),
        ):
            if dtype in (Dtype.FP32, Dtype.BF16):
                break
            rate = rate if known is None else known
            if dtype is narrower:
                break
        return rate


def with_network(hardware: Hardware, network: Network) -> Hardware:
    """`hardware` whose nodes are joined by `network`.

    Raises
    ------
    InvalidProblemError
        When ``pair_bandwidth`` says what joins its nodes: one of the two must be wrong.
    """
    if len(hardware.pair_bandwidth) > hardware.ranks_per_node:
        raise InvalidProblemError(
            f"with_network: {hardware.name} has the bandwidth of each pair of ranks, "
            f"also between nodes, so {network.name} cannot join them: leave one out"
        )
    return replace(
        hardware,
        nic_bandwidth=network.bandwidth,
        nic_of=network.link_of,
        node_latency=network.latency,
        network=network.name,
        sources=(*hardware.sources, *network.sources),
    )


def _check_named(where: str, value: Any) -> None:
    name, sources = value.name, value.sources
    if not isinstance(name, str) or not name.isprintable():
        raise InvalidProblemError(f"{where}: name must be printable text, got {name!r}")
    if isinstance(sources, str) or not all(isinstance(s, str) for s in sources):
        raise InvalidProblemError(
            f"{where}: sources must be a list of texts, got {sources!r}"
        )
    object.__setattr__(value, "sources", tuple(sources))


Kind = TypeVar("Kind", Hardware, Network)


class Known(Mapping[str, Kind], Generic[Kind]):
    """The files of a folder of moetuner/data by name, each read when it is used."""

    def __init__(self, folder: str, kind: type[Kind]) -> None:
        self._folder = Path(__file__).parents[1] / "data" / folder
        self._kind: type[Kind] = kind
        self._read: dict[str, Kind] = {}

    def __getitem__(self, name: str) -> Kind:
        from moetuner.evaluation.hardware_file import read_file

        if name not in self._read:
            if name not in self._names():
                raise KeyError(name)
            self._read[name] = read_file(self.path(name), self._kind)
        return self._read[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._names())

    def __len__(self) -> int:
        return len(self._names())

    def path(self, name: str) -> Path:
        """The file of a known name."""
        return self._folder / f"{name}.toml"

    def _names(self) -> list[str]:
        return sorted(path.stem for path in self._folder.glob("*.toml"))


HARDWARE: Known[Hardware] = Known("machines", Hardware)
"""Known machines by name."""
NETWORKS: Known[Network] = Known("networks", Network)
"""Known networks by name."""
