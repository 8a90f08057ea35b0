"""What a machine can do: kinds of GPU nodes, with the source of every constant."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from moetuner._checks import check_positive, is_number
from moetuner.errors import InvalidProblemError


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
            check_positive("Hardware", name, getattr(self, name))
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
