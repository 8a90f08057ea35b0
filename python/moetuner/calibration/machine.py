"""What a machine says of itself, as far as it does not say whose it is."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from moetuner._words import amount


@dataclass(frozen=True, kw_only=True, slots=True)
class Machine:
    """What was measured on; no host name, no user, no address."""

    device: str
    """Name of the GPU, or of the CPU where ranks compute on it."""
    num_devices: int
    """GPUs of a node that ranks use; 0 on CPUs."""
    num_ranks: int
    cpu: str
    num_cores: int
    """Of a node, that this program may use."""
    backend: str
    """Of the process group: nccl or gloo."""
    transport: str
    """What carried rows of the exchange."""
    torch: str
    cuda: str = ""
    nccl: str = ""
    driver: str = ""

    def words(self) -> str:
        """All of it in a line."""
        versions = {"torch": self.torch, "CUDA": self.cuda, "NCCL": self.nccl}
        versions["driver"] = self.driver
        where = (
            f"{self.num_devices} x {self.device}" if self.num_devices else self.device
        )
        said = [
            f"{amount(self.num_ranks, 'rank')}, {where} a node",
            f"{amount(self.num_cores, 'core')} of {self.cpu}",
            f"{self.backend}; rows over {self.transport}",
            *(f"{name} {value}" for name, value in versions.items() if value),
        ]
        return ", ".join(said)


def cpu_name() -> str:
    """As the kernel has it."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.split(":")[1].strip() for line in lines if "model name" in line]
    return names[0] if names else "unknown"


def driver_version() -> str:
    """Of NVIDIA's kernel module; empty where there is none."""
    version = Path("/proc/driver/nvidia/version")
    if not version.exists():
        return ""
    found = re.search(r"\b\d+\.\d+(\.\d+)?\b", version.read_text())
    return found[0] if found else ""
