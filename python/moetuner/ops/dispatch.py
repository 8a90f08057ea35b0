"""Rows to the ranks of their experts: where a placement sends a model's tokens.

Legend: T tokens here, K top-k, E experts, R most slots of an expert, G ranks, S slots
of a rank, D = min(K, G), N rows that arrive, M (token, expert) rows, H hidden.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import torch

from moetuner.errors import ExchangeOverflowError
from moetuner.ops._collectives import group_named
from moetuner.ops._devices import same_device
from moetuner.ops._effects import keep_in_order, teach_inductor
from moetuner.ops._ranges import ranged
from moetuner.ops._scaled_rows import join, part

if TYPE_CHECKING:
    from moetuner.ops.node_groups import NodeGroups


@dataclass(frozen=True, eq=False)
class NodeHop:
    """How rows crossed between nodes, ahead of all else."""

    send_map: torch.Tensor
    """int32 [T, min(K, nodes)], row on the wire of each node that a token goes to, in
    their order; -1: no more."""
    splits: torch.Tensor
    """int64 [2, nodes] on the CPU, rows to and from each node; empty where all shares
    are equal."""
    group_name: str
    """Of the ranks of this place in all nodes."""


@dataclass(frozen=True, eq=False)
class ExchangeHandle:
    """What `combine` must know of one `dispatch`: plain tensors, and their groups.

    With two levels, A rows came to this rank from all nodes, and took its place. On one
    level A is T, and the group is that of all G ranks.
    """

    recv_map: torch.Tensor
    """int32 [N, K], row of each choice of each token that arrived; -1: not here."""
    recv_weights: torch.Tensor
    """float32 [N, K], weights of the same choices; 0 where they are not here."""
    send_map: torch.Tensor
    """int32 [A, D], row on the wire of each rank of the group that a row goes to, in
    rank order; -1: no more."""
    splits: torch.Tensor
    """int64 [2, G] on the CPU, rows to and from each rank of the group; empty where all
    shares are equal."""
    group_name: str
    """Of the ranks; with two levels, of those of this node."""
    overflow: torch.Tensor | None = None
    """int32 [1] of the fixed form: rows that found no room, here and on the wire; see
    `check_overflow`."""
    between: NodeHop | None = None
    """With two levels: the hop ahead of this one."""

    @property
    def send_maps(self) -> list[torch.Tensor]:
        """Of each hop, in their order."""
        return [hop.send_map for hop in self._hops]

    @property
    def all_splits(self) -> list[torch.Tensor]:
        """Of each hop, in their order."""
        return [hop.splits for hop in self._hops]

    @property
    def groups(self) -> list[str]:
        """Names of the groups of each hop, in their order."""
        return [hop.group_name for hop in self._hops]

    @property
    def _hops(self) -> list[NodeHop | ExchangeHandle]:
        return [self] if self.between is None else [self.between, self]


class Dispatched(NamedTuple):
    """What arrived, in expert order, and the way back."""

    rows: torch.Tensor
    """[M, H] of x's dtype, by slot of this rank; inside a slot by sender and token
    (with two levels the sender is the gateway, and its rows are by node and token).
    Rows behind the last end offset (the fixed form has some) are **undefined**: they
    are nobody's, may hold anything, NaN too, and must not be read."""
    end_offsets: torch.Tensor
    """int32 [S], end of each slot's rows: `offs` of
    `torch.nn.functional.grouped_mm`."""
    handle: ExchangeHandle
    """For `combine`."""
    row_scales: torch.Tensor | None = None
    """[M, C] of the scales' dtype, where scales were given. `rows` and these are views
    of one tensor then: contiguous inside a row, and 16 bytes or a multiple from row to
    row."""


@ranged
def dispatch(
    x: torch.Tensor,
    topk_ids: torch.Tensor,
    topk_weights: torch.Tensor,
    candidates: torch.Tensor,
    num_candidates: torch.Tensor,
    slots_per_rank: int,
    group_name: str,
    *,
    ranks_per_node: int = 0,
    nodes: NodeGroups | None = None,
    capacity: int | None = None,
    max_rows: int | None = None,
    counters: torch.Tensor | None = None,
    scales: torch.Tensor | None = None,
) -> Dispatched:
    """Send each token's row once to every rank that has one of its experts.

    With `nodes`, it crosses once to every other *node* that has one, to the rank of its
    own place there, which passes it on to the ranks of that node.

    Every rank of the group calls this, with any number of tokens, none included.

    Parameters
    ----------
    x
        [T, H], contiguous: float32, bfloat16, float16, float8_e4m3fn or float8_e5m2.
    topk_ids
        int32 or int64 [T, K], contiguous. Ids outside [0, E) are padding; beyond int32
        they are refused, on CUDA by a device assertion.
    topk_weights
        [T, K], any floating type; they travel as float32.
    candidates, num_candidates
        int32 [E, R] and [E] of a `moetuner.PlacementTables`: the slots that this rank
        may use for each expert. Token t takes number ``t % num_candidates[e]``.
    slots_per_rank
        S; slot p lives on rank ``p // S``.
    group_name
        ``group.group_name`` of the process group whose ranks hold the experts. Its own
        communicator carries the rows (NCCL on CUDA, Gloo on the CPU), or mapped memory:
        see `set_transport`.
    ranks_per_node
        For `counters`; 0: all ranks share a node, or as `nodes` say.
    nodes
        Of `node_groups`: two levels. None: one level, whatever the nodes are.
    capacity, max_rows
        Absent: exact sizes, for which **the host waits once for the counts** (with
        `nodes` and mapped memory twice, for those between nodes and inside one). On one
        level over mapped memory it waits when all is enqueued, where the last call with
        these `candidates` had as many tokens: it guesses sizes from that one. Given,
        both: the fixed form. Each rank sends ``capacity`` rows to each rank and has
        ``max_rows`` rows for its experts, so that M, N = G * capacity and all other
        sizes are known: no look at the host, and CUDA graphs capture it. With `nodes`,
        ``capacity`` rows go from each rank to each node, and as many times the number
        of nodes from rank to rank inside one. Rows that find no room are left out and
        counted in ``handle.overflow``. A capacity of the most tokens of any rank holds
        all, on one level and on two.
    counters
        int64 ``[1 + G + nodes + G * S]``, added to: tokens, rows to each rank and to
        each node (the own ones too), choices of each slot. With `nodes` there is one
        more for each rank of a node: rows that this rank passed on to it, its own
        tokens' too.
    scales
        [T, C] of any dtype, for x of FP8: C = 1 for one per row, H / 128 for one per
        128 values. They travel with their rows, to `row_scales`.

    Returns
    -------
    Dispatched

    Raises
    ------
    ValueError, TypeError
        Naming the argument, what was wanted and what came.

    Notes
    -----
    The same bits on every run. Differentiable in x (unless it is FP8) and
    topk_weights, in backward mode. Compiled, it is never removed or reordered, so that
    ranks whose graphs differ (no tokens, one token) still meet.

    Examples
    --------
    A group of one rank that holds three experts:

    >>> import tempfile, torch, torch.distributed as dist
    >>> from moetuner.ops import combine, dispatch
    >>> store = dist.FileStore(tempfile.mktemp(), 1)
    >>> dist.init_process_group("gloo", store=store, rank=0, world_size=1)
    >>> x = torch.tensor([[1.0], [2.0]])
    >>> ids, weights = torch.tensor([[2, 0], [2, -1]]), torch.ones(2, 2)
    >>> slot_of = torch.tensor([[0], [1], [2]], dtype=torch.int32)
    >>> one = torch.ones(3, dtype=torch.int32)
    >>> group = dist.group.WORLD.group_name
    >>> sent = dispatch(x, ids, weights, slot_of, one, 3, group)
    >>> sent.rows.flatten().tolist(), sent.end_offsets.tolist()
    ([1.0, 1.0, 2.0], [1, 1, 3])
    >>> combine(10 * sent.rows, sent.handle).flatten().tolist()
    [20.0, 20.0]
    >>> dist.destroy_process_group()
    """
    groups = [group_name] if nodes is None else [nodes.between, nodes.inside]
    travelling = x if scales is None else join(x, scales)
    rows, end_offsets, recv_map, recv_weights, overflow, counted, *hops = (
        torch.ops.moetuner.dispatch.default(
            travelling,
            topk_ids,
            topk_weights.float(),
            candidates,
            num_candidates,
            slots_per_rank,
            groups,
            capacity=capacity,
            max_rows=max_rows,
            ranks_per_node=ranks_per_node,
            counts=counters is not None,
        )
    )
    if counters is not None:
        _add(counters, counted)
    half = len(groups)
    handle = ExchangeHandle(
        recv_map,
        recv_weights,
        hops[half - 1],
        hops[-1],
        groups[-1],
        None if capacity is None else overflow,
        None if nodes is None else NodeHop(hops[0], hops[half], groups[0]),
    )
    if scales is None:
        return Dispatched(rows, end_offsets, handle)
    rows, row_scales = part(rows, x.shape[1], scales.shape[1], scales.dtype)
    return Dispatched(rows, end_offsets, handle, row_scales)


def _add(counters: torch.Tensor, counted: torch.Tensor) -> None:
    """Add, where both are alike."""
    if counters.shape != counted.shape or counters.dtype != counted.dtype:
        raise ValueError(
            f"dispatch: counters must be int64 {list(counted.shape)}, got "
            f"{counters.dtype} {list(counters.shape)}"
        )
    counters += counted


def check_overflow(overflow: torch.Tensor) -> None:
    """Raise where a fixed `dispatch` left rows out; **waits for the device**.

    Parameters
    ----------
    overflow
        `ExchangeHandle.overflow`, or a sum of several.

    Raises
    ------
    ExchangeOverflowError
        Saying how many rows found no room on this rank.
    """
    lost = int(overflow)
    if lost:
        raise ExchangeOverflowError(
            f"dispatch: {lost} rows found no room on this rank: raise capacity (rows "
            f"from one rank to another) or max_rows (rows of one rank's experts)"
        )


def buffer_nbytes(
    num_tokens: int,
    top_k: int,
    hidden: int,
    num_ranks: int,
    dtype: torch.dtype,
    *,
    capacity: int | None = None,
    max_rows: int | None = None,
) -> int:
    """Bytes that one `dispatch` allocates on this rank, at most.

    Parameters
    ----------
    num_tokens, top_k, hidden, num_ranks, dtype
        T, the most tokens of any rank; K, H, G; of x.
    capacity, max_rows
        As for `dispatch`. Absent: the exact form, under the worst routing, where every
        token chooses experts of this rank alone. Where sizes are guessed, 64 rows and
        3 % of those of the call before may come on top.

    Examples
    --------
    >>> import torch
    >>> from moetuner.ops import buffer_nbytes
    >>> buffer_nbytes(32, 8, 7168, 8, torch.bfloat16, capacity=32, max_rows=512)
    14741508
    """
    destinations = min(top_k, num_ranks)
    if capacity is None or max_rows is None:
        sent, received = num_tokens * destinations, num_tokens * num_ranks
        max_rows = received * top_k
        counts = 4 * 2 * num_ranks * 2
    else:
        sent = received = num_ranks * capacity
        counts = 4
    row = hidden * dtype.itemsize
    travel = 2 * 4 * top_k
    routed = num_tokens * (4 * destinations + travel)
    placed = received * 3 * 4 * top_k  # slots, weights, map
    return (
        routed
        + num_tokens * 4 * destinations
        + counts
        + (sent + received) * (row + travel)
        + placed
        + max_rows * row
    )


@torch.library.register_fake("moetuner::dispatch")  # type: ignore[untyped-decorator,unused-ignore]
def _fake(
    x: torch.Tensor,
    topk_ids: torch.Tensor,
    topk_weights: torch.Tensor,
    candidates: torch.Tensor,
    num_candidates: torch.Tensor,
    slots_per_rank: int,
    groups: list[str],
    *,
    capacity: int | torch.SymInt | None = None,
    max_rows: int | torch.SymInt | None = None,
    ranks_per_node: int = 0,
    counts: bool = False,
) -> list[torch.Tensor]:
    teach_inductor()
    tables = {"candidates": candidates, "num_candidates": num_candidates}
    others = {"topk_ids": topk_ids, "topk_weights": topk_weights}
    same_device("dispatch", x, **others, **tables)
    places = [group_named(name).size() for name in groups]
    num_ranks, passed_on = math.prod(places), places[-1] if len(places) > 1 else 0
    num_tokens, top_k = topk_ids.shape
    fixed = capacity is not None and max_rows is not None
    context = torch.library.get_ctx()
    here: list[int | torch.SymInt] = [num_tokens]  # rows ahead of each hop
    for size in places[:-1]:
        room = capacity * size if capacity is not None else context.new_dynamic_size()
        here.append(room)
    if capacity is not None and max_rows is not None:
        num_received, num_rows = capacity * num_ranks, max_rows
    else:
        num_received, num_rows = context.new_dynamic_size(), context.new_dynamic_size()
    num_nodes = num_ranks // (passed_on or ranks_per_node or num_ranks)
    num_counted = 1 + num_ranks + num_nodes + num_ranks * slots_per_rank + passed_on

    def ints(*shape: int | torch.SymInt) -> torch.Tensor:
        return x.new_empty(shape, dtype=torch.int32)

    def split(size: int) -> torch.Tensor:
        shape = (0,) if fixed else (2, size)
        return torch.empty(shape, dtype=torch.int64, device="cpu")

    return [
        x.new_empty(num_rows, x.shape[1]),
        ints(slots_per_rank),
        ints(num_received, top_k),
        x.new_empty(num_received, top_k, dtype=torch.float32),
        ints(1 if fixed else 0),
        x.new_empty(num_counted if counts else 0, dtype=torch.int64),
        *(ints(n, min(top_k, size)) for n, size in zip(here, places, strict=True)),
        *map(split, places),
    ]


keep_in_order("dispatch")
