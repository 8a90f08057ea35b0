"""How the tokens of a layer travel: what may be chosen, and what that comes to."""

from __future__ import annotations

import enum
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch.distributed as dist

from moetuner._checks import is_whole, one_of
from moetuner.errors import InvalidProblemError
from moetuner.ops._collectives import group_named
from moetuner.ops.transport import Transport, describe_transport

if TYPE_CHECKING:
    from moetuner.ops.node_groups import NodeGroups
    from moetuner.placement.topology import Topology


OVERLAP_BLOCKS = 48
"""Of the exchange that runs beside experts, which have the rest of the GPU."""


class Residency(enum.Enum):
    """Where a token is after a layer."""

    HOME = "home"
    """Where it was before."""
    FOLLOW = "follow"
    """On the rank of its first expert."""


class Levels(enum.Enum):
    """How rows cross from node to node."""

    AUTO = "auto"
    """Two levels where the placement has several nodes of several ranks: a row crosses
    once to each node, and is passed on there. So does the evaluator count."""
    ONE = "one"
    """One level always: a row crosses once to each rank."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ExchangeOptions:
    """How tokens travel.

    Parameters
    ----------
    residency
        Where a token is afterwards.
    capacity, max_rows
        Both or neither; of the fixed form of `moetuner.ops.dispatch`, which looks at
        nothing on the host and can be captured by a CUDA graph.
    levels
        How rows cross from node to node.
    transport, senders, blocks
        What carries rows on CUDA (on two levels inside a node), how many blocks send,
        and how many there are at most: see `moetuner.ops.set_transport`, which an
        `Exchange` calls where any is given.
    overlap
        Cuts the tokens of a rank in two, and runs the exchange of one half beside the
        experts of the other: on a stream of its own, with `blocks`, or `OVERLAP_BLOCKS`
        where none are said. Each half has half of ``capacity`` and ``max_rows``,
        rounded up. On the CPU the halves run one after the other.

    Raises
    ------
    InvalidProblemError
        When they do not fit together, or one is not of its kind.
    """

    residency: Residency = Residency.HOME
    capacity: int | None = None
    max_rows: int | None = None
    levels: Levels = Levels.AUTO
    transport: Transport = Transport.AUTO
    senders: int | None = None
    blocks: int | None = None
    overlap: bool = False

    def __post_init__(self) -> None:
        residency = one_of(Residency, self.residency, "ExchangeOptions: residency")
        object.__setattr__(self, "residency", residency)
        levels = one_of(Levels, self.levels, "ExchangeOptions: levels")
        object.__setattr__(self, "levels", levels)
        transport = one_of(Transport, self.transport, "ExchangeOptions: transport")
        object.__setattr__(self, "transport", transport)
        if (self.capacity is None) != (self.max_rows is None):
            raise InvalidProblemError(
                f"ExchangeOptions: capacity and max_rows go together, got "
                f"capacity={self.capacity}, max_rows={self.max_rows}"
            )
        for name in ("capacity", "max_rows", "senders", "blocks"):
            value = getattr(self, name)
            if value is not None and (not is_whole(value) or value < 1):
                raise InvalidProblemError(
                    f"ExchangeOptions: {name} must be a positive whole number, got "
                    f"{value!r}"
                )
        if not isinstance(self.overlap, bool):
            raise InvalidProblemError(
                f"ExchangeOptions: overlap must be True or False, got {self.overlap!r}"
            )
        if residency is Residency.FOLLOW and self.capacity is not None:
            raise InvalidProblemError(
                "ExchangeOptions: residency=follow needs exact sizes: leave out "
                "capacity and max_rows"
            )
        if residency is Residency.FOLLOW and self.overlap:
            raise InvalidProblemError(
                "ExchangeOptions: overlap needs residency=home: tokens that follow "
                "their experts end in one order, not in that of two halves"
            )

    @property
    def chooses_transport(self) -> bool:
        """Whether anything is said that `moetuner.ops.set_transport` takes."""
        wanted = self.transport is not Transport.AUTO
        return wanted or self.senders is not None or self.most_blocks is not None

    @property
    def most_blocks(self) -> int | None:
        """Blocks that a kernel of the exchange has at most; None: all."""
        return OVERLAP_BLOCKS if self.overlap and self.blocks is None else self.blocks

    def share(self, rows: int | None) -> int | None:
        """Rows that one dispatch has room for, of those of a call."""
        return rows if rows is None or not self.overlap else (rows + 1) // 2

    def in_words(self) -> str:
        """What must be the same on all ranks."""
        words = [self.residency.value]
        if self.levels is Levels.ONE:
            words.append("one level")
        if self.capacity is not None:
            words.append(f"capacity {self.capacity}")
        words.append(f"transport {self.transport.value}")
        if self.overlap:
            words.append("overlap")
        return ", ".join(words)


def takes_two_levels(options: ExchangeOptions, topology: Topology) -> bool:
    """Whether rows cross between nodes by a hop of their own."""
    return (
        options.levels is Levels.AUTO
        and 1 < topology.ranks_per_node < topology.num_ranks
    )


def describe(
    options: ExchangeOptions,
    topology: Topology,
    group_name: str,
    groups: NodeGroups | None,
    *,
    on_cuda: bool,
) -> str:
    """What carries tokens, in words, part by part; `groups` where there are levels."""
    wire = last = dist.get_backend(group_named(group_name)).upper()
    if on_cuda:
        last = describe_transport(groups.inside if groups else group_name)
    nodes = f"{topology.num_nodes} nodes of {topology.ranks_per_node} ranks"
    if groups:
        way = (
            f"two levels on {nodes}: over {wire} a row crosses once to each other node "
            f"that needs it, to the rank of the same place there, which passes it on "
            f"once to each rank, over {last}"
        )
    else:
        way = f"one level on {nodes}: over {wire} a row goes once to each rank"
    sizes = "exact sizes, for which the host waits once a dispatch"
    if groups and on_cuda:
        sizes += ", and once more where memory is mapped"
    if options.capacity is not None:
        sizes = (
            f"fixed sizes, {options.capacity} rows to each place and "
            f"{options.max_rows} for the experts of a rank; the host waits for nothing"
        )
    end = "sums return to the token's home"
    if options.residency is Residency.FOLLOW:
        again = ", for the rows of each hop too" if groups else ""
        end = (
            f"sums end on the rank of the token's first expert; the host waits "
            f"again{again}"
        )
    if options.overlap:
        end += "; tokens go in two halves, one's exchange beside the other's experts"
    return "; ".join([way, sizes, end])
