"""Rows to the ranks of their experts: where a placement sends a model's tokens.

Legend: T tokens here, K top-k, E experts, R most slots of an expert, G ranks, S slots
of a rank, D = min(K, G), N rows that arrive, M (token, expert) rows, H hidden.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch

from moetuner.errors import ExchangeOverflowError
from moetuner.ops._collectives import group_named
from moetuner.ops._devices import same_device
from moetuner.ops._effects import keep_in_order
from moetuner.ops._ranges import ranged


@dataclass(frozen=True, eq=False)
class ExchangeHandle:
    """What `combine` must know of one `dispatch`: plain tensors, and their group."""

    recv_map: torch.Tensor
    """int32 [N, K], row of each choice of each token that arrived; -1: not here."""
    recv_weights: torch.Tensor
    """float32 [N, K], weights of the same choices; 0 where they are not here."""
    send_map: torch.Tensor
    """int32 [T, D], row on the wire of each rank that a token goes to, in rank order;
    -1: no more."""
    splits: torch.Tensor
    """int64 [2, G] on the CPU, rows to and from each rank; empty where all shares are
    equal."""
    group_name: str
    """Of the ranks."""
    overflow: torch.Tensor | None = None
    """int32 [1] of the fixed form: rows that found no room, here and on the wire; see
    `check_overflow`."""


class Dispatched(NamedTuple):
    """What arrived, in expert order, and the way back."""

    rows: torch.Tensor
    """[M, H] of x's dtype, by slot of this rank; inside a slot by sender and token.
    Rows behind the last end offset (the fixed form has some) are **undefined**: they
    are nobody's, may hold anything, NaN too, and must not be read."""
    end_offsets: torch.Tensor
    """int32 [S], end of each slot's rows: `offs` of
    `torch.nn.functional.grouped_mm`."""
    handle: ExchangeHandle
    """For `combine`."""


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
    capacity: int | None = None,
    max_rows: int | None = None,
    counters: torch.Tensor | None = None,
) -> Dispatched:
    """Send each token's row once to every rank that has one of its experts.

    Every rank of the group calls this, with any number of tokens, none included.

    Parameters
    ----------
    x
        [T, H], contiguous: float32, bfloat16, float16, float8_e4m3fn or float8_e5m2.
    topk_ids
        int32 or int64 [T, K], contiguous. Ids outside [0, E) are padding.
    topk_weights
        [T, K], any floating type; they travel as float32.
    candidates, num_candidates
        int32 [E, R] and [E] of a `moetuner.PlacementTables`: the slots that this rank
        may use for each expert. Token t takes number ``t % num_candidates[e]``.
    slots_per_rank
        S; slot p lives on rank ``p // S``.
    group_name
        ``group.group_name`` of the process group whose ranks hold the experts. Its own
        communicator carries the rows (NCCL on CUDA, Gloo on the CPU).
    ranks_per_node
        For `counters`; 0: all ranks share a node.
    capacity, max_rows
        Absent: exact sizes, for which **the host waits once for the counts**. Given,
        both: the fixed form. Each rank sends ``capacity`` rows to each rank and has
        ``max_rows`` rows for its experts, so that M, N = G * capacity and all other
        sizes are known: no look at the host, and CUDA graphs capture it. Rows that find
        no room are left out and counted in ``handle.overflow``.
    counters
        int64 ``[1 + G + nodes + G * S]``, added to: tokens, rows to each rank and to
        each node (the own ones too), choices of each slot.

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
    rows, end_offsets, *maps, splits, overflow, counted = torch.ops.moetuner.dispatch(
        x,
        topk_ids,
        topk_weights.float(),
        candidates,
        num_candidates,
        slots_per_rank,
        group_name,
        capacity=capacity,
        max_rows=max_rows,
        ranks_per_node=ranks_per_node,
        counts=counters is not None,
    )
    if counters is not None:
        _add(counters, counted)
    lost = None if capacity is None else overflow
    recv_map, recv_weights, send_map = maps
    handle = ExchangeHandle(recv_map, recv_weights, send_map, splits, group_name, lost)
    return Dispatched(rows, end_offsets, handle)


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
        token chooses experts of this rank alone.

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
    group_name: str,
    *,
    capacity: int | torch.SymInt | None = None,
    max_rows: int | torch.SymInt | None = None,
    ranks_per_node: int = 0,
    counts: bool = False,
) -> list[torch.Tensor]:
    tables = {"candidates": candidates, "num_candidates": num_candidates}
    others = {"topk_ids": topk_ids, "topk_weights": topk_weights}
    same_device("dispatch", x, **others, **tables)
    num_ranks = group_named(group_name).size()
    num_tokens, top_k = topk_ids.shape
    split_shape: tuple[int, ...]
    if capacity is not None and max_rows is not None:
        num_received, num_rows, split_shape = capacity * num_ranks, max_rows, (0,)
    else:
        context = torch.library.get_ctx()
        num_received, num_rows = context.new_dynamic_size(), context.new_dynamic_size()
        split_shape = (2, num_ranks)
    num_nodes = num_ranks // (ranks_per_node or num_ranks)
    num_counted = 1 + num_ranks + num_nodes + num_ranks * slots_per_rank

    def ints(*shape: int | torch.SymInt) -> torch.Tensor:
        return x.new_empty(shape, dtype=torch.int32)

    return [
        x.new_empty(num_rows, x.shape[1]),
        ints(slots_per_rank),
        ints(num_received, top_k),
        x.new_empty(num_received, top_k, dtype=torch.float32),
        ints(num_tokens, min(top_k, num_ranks)),
        torch.empty(split_shape, dtype=torch.int64, device="cpu"),
        ints(0 if capacity is None else 1),
        x.new_empty(num_counted if counts else 0, dtype=torch.int64),
    ]


keep_in_order("dispatch")
