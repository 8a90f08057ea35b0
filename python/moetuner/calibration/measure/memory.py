"""Whether there is room for what is to be measured, found out before it is made."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from moetuner.calibration.budget import Allowance
    from moetuner.calibration.measure.ranks import Ranks

_OF_FREE = 0.8  # of it; allocators and communicators take some too


def need_memory(ranks: Ranks, num_bytes: float, what: str) -> None:
    """Make sure that every rank can have so many bytes beside all others.

    Raises
    ------
    CalibrationError
        On all ranks, naming those that cannot, and what it was for.
    """
    free, trouble = free_bytes(ranks), ""
    if num_bytes > _OF_FREE * free:
        trouble = (
            f"too little memory on {ranks.device.type} for {what}: wanted "
            f"{num_bytes / 1e9:.2f} GB, {free / 1e9:.2f} GB are free for a rank: "
            f"measure a smaller layer, or use more ranks"
        )
    ranks.check(trouble)


def has_memory(
    ranks: Ranks,
    allowance: Allowance,
    series: str,
    size: float,
    num_bytes: float,
    what: str,
) -> bool:
    """Whether every rank can have so many bytes; what it is for is left out if not.

    Raises
    ------
    CalibrationError
        As `need_memory`, where the series has no smaller size that was measured.
    """
    if not allowance.knows(series):
        need_memory(ranks, num_bytes, what)
        return True
    if ranks.largest([float(num_bytes > _OF_FREE * free_bytes(ranks))])[0]:
        allowance.leave_out(series, size, "memory")
        return False
    return True


def free_bytes(ranks: Ranks) -> float:
    """Of the device, shared among the ranks that use it."""
    local = int(os.environ.get("LOCAL_WORLD_SIZE", ranks.topology.ranks_per_node))
    if ranks.on_cuda:
        free, _ = torch.cuda.mem_get_info()
        cached = torch.cuda.memory_reserved() - torch.cuda.memory_allocated()
        return (free + cached) / max(-(-local // torch.cuda.device_count()), 1)
    return _free_on_host() / local


def _free_on_host() -> float:
    """What the kernel could give, and what it would let a container have."""
    told = Path("/proc/meminfo").read_text()
    found = re.search(r"^MemAvailable:\s+(\d+) kB", told, re.MULTILINE)
    free = float(found[1]) * 1024 if found else float("inf")
    limit, used = (Path(f"/sys/fs/cgroup/memory.{name}") for name in ("max", "current"))
    if (
        limit.exists()
        and used.exists()
        and (most := limit.read_text().strip()) != "max"
    ):
        free = min(free, float(most) - float(used.read_text()))
    return free
