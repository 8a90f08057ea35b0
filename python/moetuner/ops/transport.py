"""What carries the rows of an exchange between the ranks of a machine, on CUDA.

Where ranks can map each other's memory (CUDA IPC between processes, on one GPU or on
several that reach each other), rows are stored straight into it by a few blocks of the
GPU, and are placed as they arrive. Otherwise the group's communicator carries them.
"""

from __future__ import annotations

import enum
import math
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from datetime import timedelta


class Transport(enum.Enum):
    """What carries rows on CUDA, on two levels those inside a node."""

    AUTO = "auto"
    """Mapped memory where all ranks can map it, else the group's communicator."""
    PEERS = "peers"
    """Mapped memory, or an error that says why not."""
    COLLECTIVES = "collectives"
    """The group's communicator."""


def set_transport(
    group_name: str,
    transport: Transport | str = Transport.AUTO,
    *,
    senders: int | None = None,
    blocks: int | None = None,
    timeout: timedelta | None = None,
) -> None:
    """Choose what carries the rows of a group; every rank of it calls this alike.

    Parameters
    ----------
    group_name
        ``group.group_name``; with two levels `NodeGroups.inside`. Call it while no
        exchange of the group is under way: mapped memory is given back, and the next
        `moetuner.ops.dispatch` decides again.
    transport
        See `Transport`.
    senders
        Blocks of a GPU that send; None: as many as suit.
    blocks
        Blocks of a GPU that an exchange has at most, senders too, 4 or more; None: all.
        Fewer leave more of it to experts that run beside.
    timeout
        Of each wait of a GPU for another rank, which with two levels may itself be
        waiting for another node; None: the group's own. After it, every
        rank raises `torch.distributed.DistBackendError` naming who waited for whom, at
        the exchange that waits or the next one.

    Raises
    ------
    ValueError
        When an argument makes no sense.

    Examples
    --------
    >>> import tempfile, torch.distributed as dist
    >>> from moetuner.ops import describe_transport, set_transport
    >>> store = dist.FileStore(tempfile.mktemp(), 1)
    >>> dist.init_process_group("gloo", store=store, rank=0, world_size=1)
    >>> group = dist.group.WORLD.group_name
    >>> set_transport(group, "collectives")
    >>> describe_transport(group)
    "the group's communicator"
    >>> dist.destroy_process_group()
    """
    number = list(Transport).index(Transport(transport))
    milliseconds = 0 if timeout is None else math.ceil(timeout.total_seconds() * 1000)
    torch.ops.moetuner.set_transport(
        group_name, number, senders or 0, milliseconds, blocks or 0
    )


def describe_transport(group_name: str) -> str:
    """What carries the rows of a group on CUDA, in words, and the bytes it takes."""
    words: str = torch.ops.moetuner.describe_transport(group_name)
    return words
