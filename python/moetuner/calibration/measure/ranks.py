"""The process group that is measured: who is in it, and how it agrees.

Legend: G ranks.
"""

from __future__ import annotations

import os
import re
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch._C._distributed_c10d import HashStore

from moetuner.calibration.options import CalibrationOptions, Device
from moetuner.errors import CalibrationError, InvalidProblemError, MoetunerError
from moetuner.placement.topology import Topology

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

TIMEOUT = timedelta(seconds=120)  # of one call: a rank that waits longer is alone
_BROKEN = "(?i)gloo|nccl|connection|timed out|timeout"
"""Of errors of a process group that are a plain RuntimeError: those of Gloo."""
_SHARES_GPU = "NCCL_MULTI_RANK_GPU_ENABLE"  # NCCL >= 2.30 lets ranks share a GPU


@dataclass(frozen=True, kw_only=True)
class Ranks:
    """One rank of the group, and what it needs to agree with the others."""

    rank: int
    topology: Topology
    device: torch.device
    backend: str

    @property
    def group_name(self) -> str:
        """As the ops take it."""
        world = dist.group.WORLD
        assert world is not None
        return str(world.group_name)

    @property
    def on_cuda(self) -> bool:
        """Whether rows are on a GPU."""
        return self.device.type == "cuda"

    def largest(self, values: Sequence[float]) -> list[float]:
        """Of each value, the largest on any rank."""
        control = self.device if self.backend == "nccl" else "cpu"
        found = torch.tensor(list(values), dtype=torch.float64, device=control)
        dist.all_reduce(found, op=dist.ReduceOp.MAX)
        return [float(value) for value in found.tolist()]

    def every(self, value: object) -> list[Any]:
        """What each rank has, in their order."""
        found: list[Any] = [None] * self.topology.num_ranks
        dist.all_gather_object(found, value)
        return found

    def check(self, trouble: str) -> None:
        """Raise on all ranks what went wrong on any.

        Raises
        ------
        CalibrationError
            Naming the ranks.
        """
        told = [
            f"rank {r}: {said}" for r, said in enumerate(self.every(trouble)) if said
        ]
        if told:
            raise CalibrationError(f"calibrate: {'; '.join(told)}")

    def wait(self) -> None:
        """Until all ranks are here, and their devices idle."""
        if self.on_cuda:
            torch.cuda.synchronize()
        if self.topology.num_ranks > 1:
            own = [self.device.index] if self.backend == "nccl" else None
            dist.barrier(device_ids=own)
            if self.on_cuda:
                torch.cuda.synchronize()


@contextmanager
def join(options: CalibrationOptions) -> Iterator[Ranks]:
    """The group that `torchrun` asked for, or one rank alone; left at the end.

    Raises
    ------
    InvalidProblemError
        When there is no such device, or ranks were started with other options.
    CalibrationError
        When ranks do not find each other, or one goes away.
    """
    device = _device(options)
    started = "WORLD_SIZE" in os.environ and "RANK" in os.environ
    local = int(os.environ.get("LOCAL_WORLD_SIZE", "1")) if started else 1
    backend = _backend(device, local)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    else:
        torch.set_num_threads(max(num_cores() // local, 1))
    try:
        if started:
            dist.init_process_group(backend, timeout=TIMEOUT)
        else:
            store = HashStore()
            dist.init_process_group(backend, store=store, rank=0, world_size=1)
    except (RuntimeError, ValueError) as error:
        raise CalibrationError(
            f"calibrate: the ranks that torchrun announced did not meet: "
            f"{first_line(error)}"
        ) from error
    try:
        yield ranks_of(options, device, options.ranks_per_node or local)
    except RuntimeError as error:
        said = _explained(error)
        if not said:
            raise
        raise CalibrationError(said) from error
    finally:
        dist.destroy_process_group()


def ranks_of(
    options: CalibrationOptions, device: torch.device, ranks_per_node: int
) -> Ranks:
    """One rank of a group that exists already; all must have the same options.

    Raises
    ------
    InvalidProblemError
        On every rank, when they have not, or do not fill nodes.
    """
    num_ranks, rank = dist.get_world_size(), dist.get_rank()
    backend = str(dist.get_backend())
    about = {
        "options": options,
        "ranks_per_node": ranks_per_node,
        "device": device.type,
        "backend": backend,
        "torch": str(torch.__version__),
    }
    every: list[dict[str, object]] = [{} for _ in range(num_ranks)]
    dist.all_gather_object(every, about)
    for other, told in enumerate(every):
        for name, value in told.items():
            if value != every[0][name]:
                raise InvalidProblemError(
                    f"calibrate: all ranks must agree, but {name} is {every[0][name]} "
                    f"on rank 0 and {value} on rank {other}"
                )
    topology = Topology(num_ranks=num_ranks, ranks_per_node=ranks_per_node)
    return Ranks(rank=rank, topology=topology, device=device, backend=backend)


def num_cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0))


def first_line(error: BaseException) -> str:
    """What an error says before its stack."""
    lines = str(error).strip().splitlines()
    return lines[0][:300] if lines else type(error).__name__


def _device(options: CalibrationOptions) -> torch.device:
    there = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if options.device is Device.CUDA and not there:
        raise InvalidProblemError(
            "calibrate: device=cuda, but torch sees no CUDA device here"
        )
    if options.device is Device.CPU or not there:
        return torch.device("cpu")
    return torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")) % there)


def _backend(device: torch.device, local: int) -> str:
    """NCCL where every rank has a GPU of its own, or may share one."""
    if device.type == "cpu":
        return "gloo"
    alone = local <= torch.cuda.device_count() or os.environ.get(_SHARES_GPU) == "1"
    return "nccl" if alone else "gloo"


def _explained(error: RuntimeError) -> str:
    """What an error of torch says of the machine; empty where it says nothing."""
    said = first_line(error)
    if isinstance(error, torch.OutOfMemoryError):
        return (
            f"calibrate: too little memory on this rank: {said}: measure a smaller "
            f"layer"
        )
    broken = isinstance(error, dist.DistError) or re.search(_BROKEN, str(error))
    if isinstance(error, MoetunerError) or not broken:
        return ""
    return (
        f"calibrate: the group broke while it was measured, because a rank ended or "
        f"no longer answers: {said}"
    )
