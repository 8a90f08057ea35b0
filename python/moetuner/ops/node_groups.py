"""The groups of two levels: ranks of one node, and ranks of one place in all nodes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

import torch
import torch.distributed as dist

from moetuner.ops._collectives import group_named
from moetuner.ops.transport import Transport, set_transport


@dataclass(frozen=True)
class NodeGroups:
    """Two groups of this rank, by their names."""

    inside: str
    """The ranks of its node, in their order."""
    between: str
    """The ranks of its place in all nodes, in the order of nodes."""


_MADE: WeakKeyDictionary[Any, dict[int, NodeGroups]] = WeakKeyDictionary()


def node_groups(group_name: str, ranks_per_node: int) -> NodeGroups:
    """The two groups; made at the first call, which every rank of the group makes.

    Parameters
    ----------
    group_name
        ``group.group_name`` of all ranks, numbered node by node.
    ranks_per_node
        More than one, on more than one node: elsewhere one level is all there is.

    Raises
    ------
    ValueError
        When there are not several nodes of several ranks.

    Notes
    -----
    They have the backends and the timeout of the group. With NCCL each is one more
    communicator; all exchanges over the same group share the two. Between nodes that
    carries rows, even where memory of all ranks could be mapped.
    """
    group = group_named(group_name)
    num_ranks = group.size()
    if not 1 < ranks_per_node < num_ranks or num_ranks % ranks_per_node:
        raise ValueError(
            f"node_groups: two levels need several nodes of several ranks, got "
            f"{num_ranks} ranks and ranks_per_node={ranks_per_node}"
        )
    made = _MADE.setdefault(group, {})
    if ranks_per_node not in made:
        made[ranks_per_node] = _make(group, ranks_per_node)
    return made[ranks_per_node]


def _make(group: Any, ranks_per_node: int) -> NodeGroups:
    ranks = dist.get_process_group_ranks(group)
    node, place = divmod(group.rank(), ranks_per_node)
    device = group._device_types[0]
    options = {
        "timeout": group._get_backend(torch.device(device)).options._timeout,
        "backend": dist.get_backend_config(group),
        "use_local_synchronization": True,  # others of the world need not call
    }
    first = node * ranks_per_node
    between = dist.new_group(ranks[place::ranks_per_node], **options)
    inside = dist.new_group(ranks[first : first + ranks_per_node], **options)
    # Kernels that wait between nodes might take the room of those inside one.
    set_transport(between.group_name, Transport.COLLECTIVES)
    return NodeGroups(inside=inside.group_name, between=between.group_name)
