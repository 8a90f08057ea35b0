"""Residency `follow`: a token's sum ends, and stays, where its first expert is.

Every rank that ran experts of a token sends its part there. On two levels the parts of
a node become one, which crosses. Legend: T tokens here before, U tokens here
afterwards, K top-k, G ranks, N rows that arrived, H hidden.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from moetuner.errors import InvalidTraceError
from moetuner.nn.way_back import LANES, WayBack, find_way_back, numbers, send_parts
from moetuner.nn.way_over_nodes import sums_over_nodes
from moetuner.ops import Dispatched, ExchangeHandle, permute, unpermute
from moetuner.ops._collectives import all_to_all_rows, exchange_counts, group_named


class Resident(NamedTuple):
    """Tokens where they are now, in order of their keys."""

    sums: torch.Tensor
    """[U, H] what the experts made of them."""
    tokens: torch.Tensor
    """[U, H] the layer's input, which came along: for the residual connection."""
    keys: torch.Tensor
    """int64 [U, 2], home rank and row there: give them to the next layer, and to
    `return_home`."""


def keys_of(num_tokens: int, group_name: str, device: torch.device) -> torch.Tensor:
    """Keys of tokens that are at home, int64 [T, 2]."""
    rows = torch.arange(num_tokens, device=device)
    rank = group_named(group_name).rank()
    return torch.stack([torch.full_like(rows, rank), rows], dim=1)


def follow_back(
    x: torch.Tensor,
    topk_ids: torch.Tensor,
    keys: torch.Tensor,
    sent: Dispatched,
    done: torch.Tensor,
    tables: tuple[torch.Tensor, torch.Tensor, int],
) -> Resident:
    """The way back of `dispatch`, but to the rank of each token's first expert.

    A token whose first choice is padding stays where it is. **The host waits once,
    for the counts**, and on two levels for the rows of each hop.
    """
    handle = sent.handle
    way = find_way_back(topk_ids, keys, handle, tables)
    parts = unpermute(done, handle.recv_map, handle.recv_weights)
    sums_of = _sums_straight if handle.between is None else sums_over_nodes
    sums = sums_of(parts, way, handle)
    return Resident(sums, _tokens(x, sent, way), way.ended())


def _sums_straight(
    parts: torch.Tensor, way: WayBack, handle: ExchangeHandle
) -> torch.Tensor:
    """Sums [U, H] of parts [N, H] from all ranks."""
    came = send_parts(parts, way.leaving, handle.group_name, LANES)
    lanes = LANES * group_named(handle.group_name).size()
    coming = permute(way.into.view(torch.float32), way.into, lanes)
    return unpermute(came.rows, coming.row_map.index_select(0, way.here()))


def _tokens(x: torch.Tensor, sent: Dispatched, way: WayBack) -> torch.Tensor:
    """[U, H] of the input, by N rows that arrived and the T that were here."""
    rows, row = sent.rows, sent.handle.recv_map[:, 0]
    if way.sizes().stayed:
        kept = torch.arange(len(x), dtype=torch.int32, device=x.device) + len(rows)
        rows, row = torch.cat([rows, x]), torch.cat([row, kept])
    return rows.index_select(0, row.index_select(0, way.here()))


def return_home(
    values: torch.Tensor, keys: torch.Tensor, num_tokens: int, group_name: str
) -> torch.Tensor:
    """Bring tokens back to where their keys say that they began.

    Parameters
    ----------
    values, keys
        [U, H] and int64 [U, 2], of the tokens that are here now.
    num_tokens
        T, tokens that began here.
    group_name
        As for the layer. Every rank calls this. **The host waits twice**: for the
        counts, and to see whether all came.

    Returns
    -------
    torch.Tensor
        [T, H] in their first order.

    Raises
    ------
    InvalidTraceError
        When other tokens come home than began here.
    """
    group = group_named(group_name)
    ranks = keys[:, :1].int()
    sent = permute(ranks.view(torch.float32), ranks, group.size())
    place = sent.row_map.flatten().long()
    order = torch.empty_like(place).scatter_(0, place, numbers(place))
    leaving = sent.end_offsets.long().diff(prepend=place.new_zeros(1))
    coming = exchange_counts(leaving, group)
    leaving, coming = torch.stack([leaving, coming]).cpu()
    rows = all_to_all_rows(keys[:, 1].index_select(0, order), leaving, coming, group)
    came = all_to_all_rows(values.index_select(0, order), leaving, coming, group)
    if len(rows) == num_tokens:
        expected = numbers(rows)
        slot = rows.clamp(0, max(num_tokens - 1, 0))
        place = torch.zeros_like(rows).scatter_(0, slot, expected)
        out = came.index_select(0, place)
        if torch.equal(rows.index_select(0, place), expected):
            return out
    raise InvalidTraceError(
        f"return_home: {len(rows)} tokens came home, wanted each of the "
        f"{num_tokens} that began here once"
    )
