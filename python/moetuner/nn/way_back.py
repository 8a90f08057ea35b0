"""Where the parts of tokens that follow their experts go, before any part is made.

A token ends on the rank of its first expert; where that is padding it stays. A note
goes with each token's row to all ranks that it visits: whose it is, where it ends, and
which ranks have a part of it.

On one level parts need no names then. They leave as rows of a `dispatch` to two lanes
of each rank: lane 2 g for those that end on rank g, 2 g + 1 for those that stay there.
In a lane they stand by the rank that sent them and the order of tokens there, which
both sides know. For two levels see `way_over_nodes`.

Legend: T tokens here before, U afterwards, K top-k, G ranks, D = min(K, G), N rows that
arrived, L = N + T tokens that may end here, W numbers of a note.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from moetuner.ops import Dispatched, ExchangeHandle, dispatch
from moetuner.ops._collectives import group_named

LANES = 2  # of each rank


class Sizes(NamedTuple):
    """Of the tokens that end here."""

    here: int
    """U."""
    stayed: int
    """Of those."""


class WayBack(NamedTuple):
    """All that is known of the way back without the host."""

    leaving: torch.Tensor
    """int32 [N, 1], the lane in which the part of each row leaves."""
    notes: torch.Tensor
    """float32 [N, W], of the same rows."""
    into: torch.Tensor
    """int32 [L, D], lane and sender, by rank, of each part of a token that ends here:
    ``lane * G + rank``, and lane 1 where it stayed; -1: no more."""
    homes: torch.Tensor
    """int64 [L, 2], home rank and row."""
    order: torch.Tensor
    """int64 [L], tokens that end here by their keys, then all others."""
    counts: torch.Tensor
    """int32 [2] on the CPU, once `ready`: U, and how many of them stayed."""
    ready: torch.cuda.Event | None

    def sizes(self) -> Sizes:
        """**The host waits for the counts**, not for what was launched after them."""
        if self.ready is not None:
            self.ready.synchronize()
        return Sizes(*self.counts.tolist())

    def here(self) -> torch.Tensor:
        """int64 [U], those of L that end here, by their keys; waits as `sizes` does."""
        return self.order[: self.sizes().here]

    def ended(self) -> torch.Tensor:
        """int64 [U, 2], home rank and row of these."""
        return self.homes.index_select(0, self.here())


def find_way_back(
    topk_ids: torch.Tensor,
    keys: torch.Tensor,
    sent: ExchangeHandle,
    tables: tuple[torch.Tensor, torch.Tensor, int],
) -> WayBack:
    """Tell the ranks that a token visits whose it is and where it ends.

    Every rank calls this after `dispatch`; nothing waits for the device.
    """
    ours, place = torch.ops.moetuner, ranks_of(sent)
    mine = ours.follow_notes(topk_ids.contiguous(), keys.contiguous(), *tables, *place)
    arrived = resend(mine, sent)
    destinations = min(topk_ids.shape[1], place[0])
    leaving, into, homes, order, counts = ours.follow_lines(
        arrived, mine, destinations, *place
    )
    on_host, ready = _to_host(counts)
    return WayBack(leaving, arrived, into, homes, order.argsort(), on_host, ready)


def ranks_of(sent: ExchangeHandle) -> tuple[int, int]:
    """G, and the number of this rank among all, which are numbered node by node."""
    group = group_named(sent.group_name)
    if sent.between is None:
        return group.size(), group.rank()
    nodes = group_named(sent.between.group_name)
    in_node = group.size()
    return in_node * nodes.size(), nodes.rank() * in_node + group.rank()


def resend(notes: torch.Tensor, sent: ExchangeHandle) -> torch.Tensor:
    """Notes [T, W] of tokens to all lines where their rows arrived, [N, W]."""
    maps = (sent.recv_map, sent.send_maps, sent.all_splits, sent.groups)
    arrived: torch.Tensor = torch.ops.moetuner.resend(notes, *maps)
    return arrived


def send_parts(
    rows: torch.Tensor, lanes: torch.Tensor, group_name: str, lanes_per_rank: int = 1
) -> Dispatched:
    """Each of N rows [N, H] in its lane int32 [N, 1], to what came, [P, H].

    By lane, in a lane by sender, and from one sender in its order.
    """
    ranks = group_named(group_name).size()
    every = torch.arange(lanes_per_rank * ranks, dtype=torch.int32, device=rows.device)
    weights = torch.ones(lanes.shape, device=rows.device)
    one = torch.ones_like(every)
    return dispatch(
        rows, lanes, weights, every[:, None], one, lanes_per_rank, group_name
    )


def numbers(like: torch.Tensor) -> torch.Tensor:
    """0, 1, ... for each entry."""
    return torch.arange(len(like), device=like.device)


def _to_host(counts: torch.Tensor) -> tuple[torch.Tensor, torch.cuda.Event | None]:
    """A copy under way, and what says that it is there."""
    if not counts.is_cuda:
        return counts, None
    on_host = counts.to("cpu", non_blocking=True)
    ready = torch.cuda.Event()  # type: ignore[no-untyped-call,unused-ignore]
    ready.record(torch.cuda.current_stream(counts.device))
    return on_host, ready
