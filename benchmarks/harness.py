"""How things are timed: medians with spread, on fresh inputs, by the device's clock."""

from __future__ import annotations

import os
import statistics
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable

REPOSITORY = Path(__file__).parents[1]


def gpu_microseconds(
    calls: list[Callable[[], object]], repeats: int = 200, warmup: int = 20
) -> dict[str, float]:
    """Time of one call by CUDA events: eager, and replayed from a CUDA graph.

    Parameters
    ----------
    calls
        The same operation on different inputs, used in turn so that the caches do not
        hold them all.
    """
    import torch

    for call in (calls * warmup)[:warmup]:
        call()
    graphs = []
    for call in calls:
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            call()
        graphs.append(graph.replay)
    result = {}
    for name, run in (("eager", calls), ("replayed", graphs)):
        times = []
        for i in range(repeats):
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            run[i % len(run)]()
            end.record()
            end.synchronize()
            times.append(start.elapsed_time(end) * 1e3)
        quartiles = statistics.quantiles(times, n=4)
        result |= {
            f"{name}_us": round(quartiles[1], 2),
            f"{name}_iqr_us": round(quartiles[2] - quartiles[0], 2),
        }
    return result


def environment() -> dict[str, str]:
    """Hardware, versions, commit and command of a result file."""
    found = {
        "command": " ".join(sys.argv),
        "commit": _output("git", "rev-parse", "HEAD"),
        "cpu": _cpu(),
        "cores": str(os.cpu_count()),
        "python": sys.version.split()[0],
    }
    if "torch" in sys.modules:
        import torch

        found["torch"] = torch.__version__
        if torch.cuda.is_available():
            found["gpu"] = torch.cuda.get_device_name()
    return found


def traces_folder() -> Path:
    """Folder of real recordings, as for the tests."""
    default = REPOSITORY.parent / "shared" / "traces"
    return Path(os.environ.get("MOETUNER_TRACES", default))


def _cpu() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.split(":")[1].strip() for line in lines if "model name" in line]
    return names[0] if names else "unknown"


def _output(*command: str) -> str:
    done = subprocess.run(
        command, cwd=REPOSITORY, capture_output=True, text=True, check=False
    )
    return done.stdout.strip() or "unknown"
