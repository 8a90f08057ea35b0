"""What moving and computing rows costs on a given machine.

One layer takes, on ranks g and links i (bytes from row counts)::

    max_g max(rows_g * flops_per_row / matmul_rate,
              active_g * expert_bytes / memory_bandwidth)
      + sum over dispatch, combine of  max_i bytes_i / bandwidth_i + latency

Few tokens are bound by the weights of the active experts, many by arithmetic. Links are
each rank's egress and ingress inside its node, and each node's egress and ingress.
"""

from __future__ import annotations

import enum
import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from moetuner._checks import is_number, one_of
from moetuner.errors import InvalidProblemError

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from moetuner.topology import Topology

    Floats = NDArray[np.float64]


def _check_positive(where: str, name: str, value: Any) -> None:
    if not is_number(value) or not 0 < value < np.inf:
        raise InvalidProblemError(f"{where}: {name} must be positive, got {value!r}")


class Wire(str, enum.Enum):
    """What crosses the network for one token."""

    DEDUP = "dedup"
    """One row per distinct remote rank; between nodes one per distinct remote node."""
    PER_EXPERT = "per_expert"
    """One row per (token, expert) on a remote rank."""
    ALLGATHER = "allgather"
    """Every row goes to every rank; placement changes only load."""


class Homes(str, enum.Enum):
    """Where a token's hidden state lives when a layer begins."""

    UNIFORM = "uniform"
    """Every rank equally likely, whatever the routing; an exact expectation."""
    RECORDED = "recorded"
    """As the trace's ``home_rank`` says."""
    FOLLOW = "follow"
    """The rank of the token's first expert a layer before; uniform at the first."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Hardware:
    """One kind of GPU node. Bandwidths in bytes/s and direction, latencies in s."""

    name: str
    memory_bandwidth: float
    matmul_rate: float
    rank_bandwidth: float
    nic_bandwidth: float
    rank_latency: float
    node_latency: float

    def __post_init__(self) -> None:
        for name in (
            "memory_bandwidth",
            "matmul_rate",
            "rank_bandwidth",
            "nic_bandwidth",
        ):
            _check_positive("Hardware", name, getattr(self, name))
        for name in ("rank_latency", "node_latency"):
            value = getattr(self, name)
            if not is_number(value) or not 0 <= value < np.inf:
                raise InvalidProblemError(
                    f"Hardware: {name} must be >= 0 s, got {value!r}"
                )


# Links of a DGX H100 / H200 node: fourth-generation NVLink, 900 GB/s per GPU in both
# directions together (NVIDIA H100 data sheet), and one ConnectX-7 at 400 Gb/s per GPU
# (NVIDIA DGX H100 user guide).
_NVLINK4 = 900e9 / 2
_NDR400 = 400e9 / 8
# NCCL's own tuning model (src/graph/tuning.cc, ring, simple protocol): base latency
# 8.4 us, plus 3.4 us over NVLink or 14 us over the network.
_RANK_LATENCY = (8.4 + 3.4) * 1e-6
_NODE_LATENCY = (8.4 + 14.0) * 1e-6

HARDWARE: dict[str, Hardware] = {
    "h100": Hardware(
        name="h100",
        memory_bandwidth=3.35e12,  # HBM3, H100 SXM data sheet
        matmul_rate=989e12,  # bf16 dense, H100 SXM data sheet
        rank_bandwidth=_NVLINK4,
        nic_bandwidth=_NDR400,
        rank_latency=_RANK_LATENCY,
        node_latency=_NODE_LATENCY,
    ),
    "h200": Hardware(
        name="h200",
        memory_bandwidth=4.8e12,  # HBM3e, H200 SXM data sheet
        matmul_rate=989e12,  # bf16 dense, H200 SXM data sheet
        rank_bandwidth=_NVLINK4,
        nic_bandwidth=_NDR400,
        rank_latency=_RANK_LATENCY,
        node_latency=_NODE_LATENCY,
    ),
}


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelShape:
    """Sizes of one expert and of the rows that travel to it.

    Parameters
    ----------
    hidden_size
        Values per row H.
    expert_hidden_size
        Inner width of one expert.
    num_projections
        Weight matrices of an expert: 3 for SwiGLU, 2 without a gate.
    dispatch_bytes, combine_bytes, weight_bytes
        Bytes per value on the way out, on the way back and in the weights
        (bf16 = 2; fp8 = 1).
    """

    hidden_size: int
    expert_hidden_size: int
    num_projections: int = 3
    dispatch_bytes: float = 2
    combine_bytes: float = 2
    weight_bytes: float = 2

    def __post_init__(self) -> None:
        for name in self.__slots__:
            _check_positive("ModelShape", name, getattr(self, name))

    @property
    def expert_values(self) -> int:
        """Weights of one expert."""
        return self.num_projections * self.hidden_size * self.expert_hidden_size

    @property
    def expert_bytes(self) -> float:
        """Bytes of one expert's weights."""
        return self.expert_values * self.weight_bytes

    @property
    def dispatch_share(self) -> float:
        """Of the bytes that a row takes both ways, those on the way out."""
        return self.dispatch_bytes / (self.dispatch_bytes + self.combine_bytes)

    @property
    def flops_per_row(self) -> float:
        """Operations of one (token, expert): a multiply and an add per weight."""
        return 2.0 * self.expert_values


# hidden_size and the routed experts' intermediate size, from each model's config.json.
MODEL_SHAPES: dict[str, ModelShape] = {
    "gpt-oss": ModelShape(hidden_size=2880, expert_hidden_size=2880),
    "deepseek-v2-lite": ModelShape(hidden_size=2048, expert_hidden_size=1408),
    "deepseek-v3": ModelShape(hidden_size=7168, expert_hidden_size=2048),
    "deepseek-r1": ModelShape(hidden_size=7168, expert_hidden_size=2048),
    "mixtral-8x7b": ModelShape(hidden_size=4096, expert_hidden_size=14336),
    "mixtral-8x22b": ModelShape(hidden_size=6144, expert_hidden_size=16384),
    "olmoe-1b-7b": ModelShape(hidden_size=2048, expert_hidden_size=1024),
    "qwen1.5-moe-a2.7b": ModelShape(hidden_size=2048, expert_hidden_size=1408),
    "qwen3-30b-a3b": ModelShape(hidden_size=2048, expert_hidden_size=768),
    "qwen3-235b-a22b": ModelShape(hidden_size=4096, expert_hidden_size=1536),
    "moetuner-demo-moe": ModelShape(hidden_size=512, expert_hidden_size=256),
}

DEFAULT_SHAPE = ModelShape(hidden_size=4096, expert_hidden_size=2048)


def shape_for_model(model: str) -> ModelShape | None:
    """Shape of a known model, found by the name inside `model`; None when unknown."""
    name = re.sub(r"[\s_]+", "-", model.lower())
    return next((shape for key, shape in MODEL_SHAPES.items() if key in name), None)


@dataclass(frozen=True, kw_only=True, slots=True)
class CostModel:
    """Machine, model, and how tokens travel: all that turns row counts into seconds.

    ``wire`` and ``homes`` may be given by their names, "dedup" say.
    ``rank_speeds`` [G] are the ranks' speeds of computing, relative to ``hardware``;
    empty when all are alike.
    """

    hardware: Hardware = HARDWARE["h100"]
    shape: ModelShape = DEFAULT_SHAPE
    wire: Wire = Wire.DEDUP
    homes: Homes = Homes.UNIFORM
    rank_speeds: tuple[float, ...] = ()

    def __post_init__(self) -> None:
        speeds = tuple(self.rank_speeds)
        for speed in speeds:
            _check_positive("CostModel", "rank_speeds", speed)
        object.__setattr__(self, "rank_speeds", speeds)
        object.__setattr__(self, "wire", one_of(Wire, self.wire, "CostModel: wire"))
        object.__setattr__(self, "homes", one_of(Homes, self.homes, "CostModel: homes"))

    def speeds(self, num_ranks: int) -> Floats:
        """``rank_speeds``, spelt out where all ranks are alike, float64 [G]."""
        return np.array(self.rank_speeds or (1.0,) * num_ranks, np.float64)

    @property
    def equal_speeds(self) -> bool:
        """Whether all ranks compute alike."""
        return len(set(self.rank_speeds)) <= 1

    def check_topology(self, topology: Topology) -> None:
        """Refuse a number of ranks that ``rank_speeds`` is not about."""
        if self.rank_speeds and len(self.rank_speeds) != topology.num_ranks:
            raise InvalidProblemError(
                f"CostModel: rank_speeds names {len(self.rank_speeds)} ranks, the "
                f"topology has {topology.num_ranks}"
            )

    def compute_seconds(self, rank_rows: Floats, active_experts: Floats) -> Floats:
        """Time of the slowest rank.

        Parameters
        ----------
        rank_rows, active_experts
            float64 [..., G]: (token, expert) rows and experts with at least one row.

        Returns
        -------
        float64 [...], seconds
        """
        arithmetic = rank_rows * (self.shape.flops_per_row / self.hardware.matmul_rate)
        weights = active_experts * (
            self.shape.expert_bytes / self.hardware.memory_bandwidth
        )
        by_rank = np.maximum(arithmetic, weights)
        if self.rank_speeds:
            by_rank = by_rank / np.array(self.rank_speeds)
        seconds: Floats = by_rank.max(axis=-1)
        return seconds

    def exchange_seconds(
        self,
        rank_rows: Floats,
        node_rows: Floats,
        bytes_per_value: float,
        topology: Topology,
    ) -> Floats:
        """Time of the slowest link in one direction of the exchange.

        Parameters
        ----------
        rank_rows, node_rows
            float64 [...]: rows on the busiest rank link and node link.
        bytes_per_value
            ``shape.dispatch_bytes`` or ``shape.combine_bytes``.

        Returns
        -------
        float64 [...], seconds; 0 where nothing crosses a link.
        """
        row_bytes = self.shape.hidden_size * bytes_per_value
        node_bandwidth = self.hardware.nic_bandwidth * topology.ranks_per_node
        transfer = np.maximum(
            rank_rows * (row_bytes / self.hardware.rank_bandwidth),
            node_rows * (row_bytes / node_bandwidth),
        )
        latency = np.where(
            node_rows > 0,
            self.hardware.node_latency,
            np.where(rank_rows > 0, self.hardware.rank_latency, 0.0),
        )
        seconds: Floats = transfer + latency
        return seconds
