"""A network of two nodes on one machine: two namespaces, a veth pair, a shaped rate.

Needs Linux, the right to make network namespaces (root in most containers), and
pyroute2; no `ip` or `tc`.
"""

from __future__ import annotations

import os
import subprocess
import time
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from threading import Thread
from typing import TYPE_CHECKING

from shaper import Lost, calm_down, lost, shape

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

NUM_NODES = 2
NOT_PERMITTED = 3
"""Exit code where the machine permits no such network."""
_POLL = 0.05  # s
_GRACE = 10.0  # s, that ranks live on after one has failed
_MTU = 9000


class NotPermitted(Exception):
    """This machine does not let us make the network; says why."""


@dataclass(frozen=True, kw_only=True)
class Node:
    """One side: the name of its namespace, and its end of the pair."""

    namespace: str
    interface: str
    address: str

    def environment(self) -> dict[str, str]:
        """Which way a rank's messages take, and that it is one of several processes."""
        return {
            "GLOO_SOCKET_IFNAME": self.interface,
            "NCCL_SOCKET_IFNAME": self.interface,
            # Else NCCL sees one machine, and our own exchange maps memory across.
            "NCCL_HOSTID": self.namespace,
            "OMP_NUM_THREADS": "1",
        }


def device_of(number: int) -> dict[str, str]:
    """What lets a rank of that node see the GPU of its node, and none else.

    Where only one is visible, both nodes share it.
    """
    told = os.environ.get("CUDA_VISIBLE_DEVICES")
    visible = _all_devices() if told is None else [d for d in told.split(",") if d]
    if not visible:
        return {}
    return {"CUDA_VISIBLE_DEVICES": visible[number % len(visible)]}


@cache
def _all_devices() -> list[str]:
    from torch.cuda import device_count

    return [str(number) for number in range(device_count())]


def wait_for(ranks: Sequence[subprocess.Popen[bytes]]) -> list[int]:
    """The codes of all ranks at their end; none is left when the wait is cut off.

    Where one fails, the others have some time to say what they saw of it.
    """
    try:
        while None in (codes := [rank.poll() for rank in ranks]):
            if any(codes):
                _wait_until(time.monotonic() + _GRACE, ranks)
                break
            time.sleep(_POLL)
    finally:
        for rank in ranks:
            rank.kill()
            rank.wait()
    return [rank.returncode for rank in ranks]


def _wait_until(end: float, ranks: Sequence[subprocess.Popen[bytes]]) -> None:
    for rank in ranks:
        with suppress(subprocess.TimeoutExpired):
            rank.wait(max(end - time.monotonic(), 0))


@contextmanager
def two_nodes(gbit: float) -> Iterator[tuple[Node, Node]]:
    """Make the network, and take it away again.

    Parameters
    ----------
    gbit
        Rate each way in Gbit/s; 0: as fast as the kernel moves packets.

    Raises
    ------
    NotPermitted
        When pyroute2 is missing, or the kernel refuses.
    """
    try:
        from pyroute2 import IPRoute, NetlinkError, NetNS, netns
    except ImportError as error:
        raise NotPermitted("pyroute2 is not installed") from error
    mark = f"mt{os.getpid()}"
    first, second = (
        Node(
            namespace=f"{mark}n{i}", interface=f"{mark}v{i}", address=f"10.77.0.{i + 1}"
        )
        for i in range(NUM_NODES)
    )
    made: list[str] = []
    try:
        for node in (first, second):
            netns.create(node.namespace)
            made.append(node.namespace)
        with IPRoute() as here:
            here.link("add", ifname=first.interface, kind="veth", peer=second.interface)
            for node in (first, second):
                index = here.link_lookup(ifname=node.interface)[0]
                here.link("set", index=index, net_ns_fd=node.namespace)
        for node in (first, second):
            with NetNS(node.namespace) as inside:
                _bring_up(inside, node, gbit)
        yield first, second
    except (OSError, NetlinkError) as error:
        if len(made) == NUM_NODES and not isinstance(error, NetlinkError):
            raise
        raise NotPermitted(f"no network namespaces or veth here: {error}") from error
    finally:
        for name in made:
            netns.remove(name)  # and with it its end of the pair


def _bring_up(inside, node: Node, gbit: float) -> None:
    index = inside.link_lookup(ifname=node.interface)[0]
    inside.addr("add", index=index, address=node.address, prefixlen=24)
    inside.link("set", index=index, mtu=_MTU, state="up")
    inside.link("set", index=inside.link_lookup(ifname="lo")[0], state="up")
    thread = Thread(target=_calm_down, args=(node,))
    thread.start()
    thread.join()
    if gbit > 0:
        shape(inside, index, gbit)


def _calm_down(node: Node) -> None:
    """In a thread of its own, which is on that node then."""
    enter(node)
    calm_down()


def enter(node: Node) -> None:
    """Put this process on that node; threads made before stay where they were."""
    from pyroute2 import netns

    netns.setns(node.namespace)


def bytes_on_link(node: Node) -> tuple[int, int]:
    """Received and sent so far at this end, headers too; for a process on that node."""
    for line in Path("/proc/thread-self/net/dev").read_text().splitlines():
        name, _, numbers = line.strip().partition(":")
        if name == node.interface:
            fields = numbers.split()
            return int(fields[0]), int(fields[8])
    raise RuntimeError(f"this process is not on {node}")


def lost_on_link(node: Node) -> Lost:
    """So far at this end; for a process on that node."""
    return lost(node.interface)
