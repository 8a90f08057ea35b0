"""Where this process runs: its rank, its device, its node, and how ranks meet."""

from __future__ import annotations

import os
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import beside  # noqa: F401
import torch
import torch.distributed as dist
from network import Node, bytes_on_link, enter, lost_on_link
from shaper import Lost, congestion_control

TIMEOUT = timedelta(seconds=300)


@dataclass(frozen=True, kw_only=True)
class Place:
    """One rank of the run."""

    device: torch.device
    control: dist.ProcessGroup
    """Over Gloo: for what the benchmark itself has to say."""
    node: Node | None = None
    """Of a network that was made for this run."""

    def settle(self) -> None:
        """All ranks have done what they were asked so far."""
        if self.device.type == "cuda":
            torch.cuda.synchronize()
        dist.barrier(group=self.control)

    def gather(self, mine: Any) -> list[Any]:
        """What every rank says, on all of them."""
        every: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(every, mine, group=self.control)
        return every

    def told_by_first(self, what: Any) -> Any:
        """What rank 0 says, on all ranks."""
        said = [what]
        dist.broadcast_object_list(said, src=0, group=self.control)
        return said[0]

    def sent_bytes(self) -> int:
        """Out of this node so far, headers too; 0 where no network was made."""
        return bytes_on_link(self.node)[1] if self.node else 0

    def lost(self) -> tuple[str, Lost] | None:
        """This node's name, and what it lost so far; None where no network was made."""
        return (self.node.namespace, lost_on_link(self.node)) if self.node else None

    def network(self) -> str:
        """What carries rows between nodes, in words."""
        if self.node is None:
            return "the machine's own"
        return f"namespaces, TCP with {congestion_control()}"


def join(task: dict[str, Any] | None, *, device: str, backend: str) -> Place:
    """Become a rank: of `two_nodes.py` by its task, else of torchrun by its variables.

    Devices are handed out node by node where there are fewer than ranks.
    """
    node = None
    known: dict[str, Any] = {}
    if task is None:
        local, here = int(os.environ["LOCAL_RANK"]), int(os.environ["LOCAL_WORLD_SIZE"])
    else:
        node = Node(**task["node"])
        enter(node)
        local, here = task["rank"], task["ranks"]
        store = dist.FileStore(f"{task['folder']}/store", task["ranks"])
        known = {"store": store, "rank": task["rank"], "world_size": task["ranks"]}
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
    chosen = torch.device("cpu")
    if device == "cuda":
        devices = torch.cuda.device_count()
        chosen = torch.device("cuda", local * devices // max(here, devices))
        torch.cuda.set_device(chosen)
    dist.init_process_group(backend, timeout=TIMEOUT, **known)
    control = dist.group.WORLD if backend == "gloo" else dist.new_group(backend="gloo")
    assert control is not None
    return Place(device=chosen, control=control, node=node)
