"""Where the parts of tokens that follow their experts go, before any part is made.

Tokens leave a rank in lanes: lane 2 g holds those that end on rank g because their
first expert is there, lane 2 g + 1 those of rank g that stay, as their first choice is
padding. In a lane they stand by the rank that sent them and their row there, on both
sides alike: so parts need no names, and each side counts for itself.

A note travels as each row did, int32 [W]: key (two int64), lane, the lanes [D] in which
parts of the token leave the ranks that it visits, and what makes W even. Legend: T
tokens here before, U afterwards, K top-k, G ranks, S slots of a rank, D = min(K, G), N
rows that arrived, L = N + T tokens that may end here.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch

from moetuner.ops import ExchangeHandle, permute
from moetuner.ops._collectives import all_to_all_rows, group_named, slots_of

_ROW_BITS = 32
_LANE, _LANES = 4, 5  # columns of a note
_NOWHERE = torch.iinfo(torch.int64).max


class WayBack(NamedTuple):
    """All that is known of the way back without the host."""

    leaving_map: torch.Tensor
    """int32 [N, K], `ExchangeHandle.recv_map` in the order in which parts leave."""
    leaving_weights: torch.Tensor
    """float32 [N, K], of the same choices."""
    coming_map: torch.Tensor
    """int32 [L, D], by rank: the parts, as they come, of each token that ends here."""
    keys: torch.Tensor
    """int64 [L, 2], home rank and row."""
    order: torch.Tensor
    """int64 [L], tokens that end here by their keys, then all others."""
    counts: torch.Tensor
    """int32 [4 G + 1] on the CPU, once `ready`: ends of lanes out and in; who stays."""
    ready: torch.cuda.Event | None

    def sizes(self, rank: int) -> tuple[torch.Tensor, torch.Tensor, int, int]:
        """Parts to and from each rank, int64 [G]; U, and how many of them stayed.

        **The host waits for the counts**, not for what was launched after them.
        """
        if self.ready is not None:
            self.ready.synchronize()
        ends, stayed = self.counts[:-1].view(2, -1), int(self.counts[-1])
        lanes = ends.diff(prepend=ends.new_zeros(2, 1))
        leaving, coming = lanes.view(2, -1, 2).sum(dim=2)
        moved = int(lanes[1, 2 * rank])  # each has a part of its own rank
        return leaving, coming, moved + stayed, stayed


def find_way_back(
    topk_ids: torch.Tensor,
    keys: torch.Tensor,
    sent: ExchangeHandle,
    tables: tuple[torch.Tensor, torch.Tensor, int],
) -> WayBack:
    """Tell the ranks that a token visits whose it is and where it ends.

    Every rank calls this after `dispatch`; nothing waits for the device.
    """
    group = group_named(sent.group_name)
    rank, num_ranks = group.rank(), group.size()
    candidates, num_candidates, slots_per_rank = tables
    first = slots_of(topk_ids[:, :1], candidates, num_candidates)
    stays = first < 0
    lane = (2 * (first // slots_per_rank)).masked_fill_(stays, 2 * rank + 1).int()

    visits = _visits(sent)
    lanes = 2 * visits + stays  # -1 stays below 0
    note = [keys.contiguous().view(torch.int32), lane, lanes]
    if lanes.shape[1] % 2 == 0:
        note.append(lane)
    mine = torch.cat(note, dim=1)
    arrived = _send_notes(mine, visits, sent, group)
    known = torch.cat([arrived, mine])
    elsewhere = torch.cat([arrived[:, _LANE] != 2 * rank, ~stays[:, 0]])

    into = known[:, _LANES : _LANES + lanes.shape[1]]
    into = into.clone(memory_format=torch.contiguous_format)
    into.masked_fill_(elsewhere[:, None], -1)
    coming = permute(into.view(torch.float32), into, 2 * num_ranks)
    out = arrived[:, _LANE : _LANE + 1].contiguous()
    leaving = permute(sent.recv_weights, out, 2 * num_ranks)
    leaving_map = permute(sent.recv_map.view(torch.float32), out, 2 * num_ranks).rows
    staying = stays.sum(dim=0, dtype=torch.int32)
    counts = torch.cat([leaving.end_offsets, coming.end_offsets, staying])
    counts, ready = _to_host(counts)

    homes = known[:, :_LANE].view(torch.int64)
    code = homes[:, 0] << _ROW_BITS | homes[:, 1]
    order = code.masked_fill_(elsewhere, _NOWHERE).argsort()
    return WayBack(
        leaving_map.view(torch.int32),
        leaving.rows,
        coming.row_map,
        homes,
        order,
        counts,
        ready,
    )


def _visits(sent: ExchangeHandle) -> torch.Tensor:
    """int32 [T, D], the rank of each row on the wire; -1: no more."""
    ends = sent.splits[0].cumsum(0).int()
    if sent.send_map.is_cuda:
        ends = ends.pin_memory()  # from other memory the copy may wait for the device
    ends = ends.to(sent.send_map.device, non_blocking=True)
    rank = torch.bucketize(sent.send_map, ends, out_int32=True, right=True)
    return rank.masked_fill_(sent.send_map < 0, -1)


def _send_notes(
    mine: torch.Tensor, visits: torch.Tensor, sent: ExchangeHandle, group: Any
) -> torch.Tensor:
    """[T, W] to [N, W], as `dispatch` sent the rows."""
    wire = permute(mine.view(torch.float32), visits, group.size()).rows
    wire = wire[: int(sent.splits[0].sum())].view(torch.int32)
    return all_to_all_rows(wire, sent.splits[0], sent.splits[1], group)


def _to_host(counts: torch.Tensor) -> tuple[torch.Tensor, torch.cuda.Event | None]:
    """A copy under way, and what says that it is there."""
    if not counts.is_cuda:
        return counts, None
    on_host = counts.to("cpu", non_blocking=True)
    ready = torch.cuda.Event()  # type: ignore[no-untyped-call,unused-ignore]
    ready.record(torch.cuda.current_stream(counts.device))
    return on_host, ready
