"""Whether there is room for what is to be measured, found out before it is made."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from moetuner.calibration.measure.ranks import Ranks

_OF_FREE = 0.8  # of it; allocators and communicators take some too


def need_memory(ranks: Ranks, num_bytes: float, what: str) -> None:
    """Make sure that every rank can have so many bytes beside all others.

    Raises
    ------
    CalibrationError
        On all ranks, naming those that cannot, and what it was for.
    """
    free = free_bytes(ranks)
    trouble = ""
    if num_bytes > _OF_FREE * free:
        trouble = (
            f"too little memory on {ranks.device.type} for {what}: wanted "
            f"{num_bytes / 1e9:.2f} GB, {free / 1e9:.2f} GB are free for a rank: "
            f"measure a smaller layer, or use more ranks"
        )
    ranks.check(trouble)


def free_bytes(ranks: Ranks) -> float:
    """Of the device, shared among the ranks that use it."""
    local = int(os.environ.get("LOCAL_WORLD_SIZE", ranks.topology.ranks_per_node))
    if ranks.on_cuda:
        free, _ = torch.cuda.mem_get_info()
        cached = torch.cuda.memory_reserved() - torch.cuda.memory_allocated()
        return (free + cached) / max(-(-local // torch.cuda.device_count()), 1)
    return _free_on_host() / local


def _free_on_host() -> float:
    told = Path("/proc/meminfo").read_text()
    found = re.search(r"^MemAvailable:\s+(\d+) kB", told, re.MULTILINE)
    return float(found[1]) * 1024 if found else float("inf")
