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
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from moetuner._checks import check_positive, one_of
from moetuner.errors import InvalidProblemError
from moetuner.evaluation.hardware import HARDWARE, Hardware
from moetuner.evaluation.shapes import DEFAULT_SHAPE, ModelShape

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from moetuner.placement.topology import Topology

    Floats = NDArray[np.float64]


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
            check_positive("CostModel", "rank_speeds", speed)
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
