"""How things are timed: medians with spread, on fresh inputs, by the device's clock."""

from __future__ import annotations

import os
import statistics
import subprocess
import sys
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable

REPOSITORY = Path(__file__).parents[1]
L2_BYTES = 50e6  # of an H100
MIN_CALLS = 24  # of a sample: the first launch of each waits for the CPU
ENOUGH_MICROSECONDS = 1e4  # of a sample, however few calls that is


def rotations(bytes_per_call: float) -> int:
    """How many sets of inputs it takes so that none is still in the L2 cache."""
    return int(min(max(4 * L2_BYTES / bytes_per_call, 2), 64))


def gpu_microseconds(
    calls: list[Callable[[], object]], repeats: int = 15, warmup: int = 3
) -> dict[str, float]:
    """Time of one call by CUDA events: eager, and replayed from a CUDA graph.

    Parameters
    ----------
    calls
        The same operation on different inputs. A repetition runs all of them, one after
        another, some times over, between two events, and keeps the latest result of
        each: no call finds its inputs or its outputs in the cache. Its time over the
        number of calls is one sample.
    """
    import torch

    def run_all(rounds: int) -> object:
        kept: list[object] = [None] * len(calls)
        for _ in range(rounds):
            for i, call in enumerate(calls):
                kept[i] = call()
        return kept

    def microseconds(run: Callable[[], object]) -> float:
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize()
        start.record()
        run()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) * 1e3

    once = min(microseconds(lambda: run_all(1)) for _ in range(warmup))
    enough = max(int(ENOUGH_MICROSECONDS / once), 1)
    rounds = min(-(-MIN_CALLS // len(calls)), enough)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        kept = run_all(rounds)
    result = {}
    for name, run in (("eager", lambda: run_all(rounds)), ("replayed", graph.replay)):
        run()
        times = [microseconds(run) / (rounds * len(calls)) for _ in range(repeats)]
        quartiles = statistics.quantiles(times, n=4)
        result |= {
            f"{name}_us": round(quartiles[1], 2),
            f"{name}_iqr_us": round(quartiles[2] - quartiles[0], 2),
        }
    del kept
    return result


@cache
def copy_bytes_per_second() -> float:
    """The ceiling of moving rows: bytes read plus bytes written by a copy of 2 GiB.

    The better of the driver's copy and of an elementwise kernel.
    """
    import torch

    source = torch.randn(2**29, device="cuda")
    target = torch.empty_like(source)
    ways = [lambda: target.copy_(source), lambda: torch.neg(source, out=target)]
    times = [gpu_microseconds([way], repeats=5)["replayed_us"] for way in ways]
    return 2 * source.nbytes / (min(times) * 1e-6)


def environment() -> dict[str, str]:
    """Hardware, versions, commit and command of a result file."""
    found = {
        "command": " ".join(["python", "-m", "pytest", *sys.argv[1:]]),
        "commit": _commit(),
        "cpu": _cpu(),
        "cores": str(os.cpu_count()),
        "python": sys.version.split()[0],
    }
    if "torch" in sys.modules:
        import torch

        found["torch"] = torch.__version__
        if torch.cuda.is_available():
            found["gpu"] = torch.cuda.get_device_name()
            found["copy_TB_per_s"] = f"{copy_bytes_per_second() / 1e12:.2f}"
    return found


def traces_folder() -> Path:
    """Folder of recordings of real models, as for the tests."""
    return Path(os.environ.get("MOETUNER_TRACES", ""))


def _cpu() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.split(":")[1].strip() for line in lines if "model name" in line]
    return names[0] if names else "unknown"


def _commit() -> str:
    """What MOETUNER_COMMIT says, for a copy without its history, else git."""
    if told := os.environ.get("MOETUNER_COMMIT"):
        return told
    done = subprocess.run(
        ["git", "rev-parse", "HEAD"],
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
        check=False,
    )
    return done.stdout.strip() or "unknown"
