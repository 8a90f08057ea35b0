"""Residency `follow`: a token's sum ends, and stays, where its first expert is.

Every rank that ran experts of a token sends its part straight to that rank. A key is a
token's home rank and its row there, packed in an int64. Legend: T tokens here before, U
tokens here afterwards, K top-k, G ranks, D = min(K, G), N rows that arrived, H hidden.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from moetuner.errors import InvalidTraceError
from moetuner.ops import Dispatched, unpermute
from moetuner.ops._collectives import (
    all_to_all_rows,
    exchange_counts,
    group_named,
    slots_of,
)

_ROW_BITS = 32


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
    group_name: str,
) -> Resident:
    """The way back of `dispatch`, but to the rank of each token's first expert.

    A token whose first choice is padding stays where it is. **The host waits for the
    counts.**
    """
    group = group_named(group_name)
    candidates, num_candidates, slots_per_rank = tables
    first = slots_of(topk_ids[:, :1], candidates, num_candidates).flatten()
    stays = first < 0
    goes_to = torch.where(stays, group.rank(), first // slots_per_rank)
    code = (keys[:, 0] << _ROW_BITS) | keys[:, 1]

    # Who sent a row also says whose it is and where its token ends.
    note = torch.stack([goes_to, code], dim=1)
    token, column = (sent.send_map >= 0).nonzero(as_tuple=True)
    wire = torch.empty(len(token), 2, dtype=torch.int64, device=x.device)
    wire[sent.send_map[token, column].long()] = note[token]
    note = all_to_all_rows(wire, sent.splits[0], sent.splits[1], group)

    parts = unpermute(done, sent.recv_map, sent.recv_weights)  # [N, H]
    order = note[:, 0].argsort(stable=True)
    leaving = torch.bincount(note[:, 0], minlength=group.size())
    coming = exchange_counts(leaving, group)
    parts = all_to_all_rows(parts[order], leaving, coming, group)
    owner = all_to_all_rows(note[order, 1], leaving, coming, group)

    own = (note[:, 0] == group.rank()) & (sent.recv_map[:, 0] >= 0)
    here = torch.cat([note[own, 1], code[stays]])
    came = torch.cat([sent.rows[sent.recv_map[own, 0].long()], x[stays]])
    by_key = here.argsort()
    here = here[by_key]
    width = min(topk_ids.shape[1], group.size())
    sums = unpermute(parts, _lines_of(torch.searchsorted(here, owner), here, width))
    back = torch.stack([here >> _ROW_BITS, here & ((1 << _ROW_BITS) - 1)], dim=1)
    return Resident(sums, came[by_key], back)


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
        As for the layer. Every rank calls this. **The host waits for the counts.**

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
    order = keys[:, 0].argsort(stable=True)
    leaving = torch.bincount(keys[:, 0], minlength=group.size())
    coming = exchange_counts(leaving, group)
    rows = all_to_all_rows(keys[order, 1], leaving, coming, group)
    came = all_to_all_rows(values[order], leaving, coming, group)
    expected = torch.arange(num_tokens, device=rows.device)
    place = rows.argsort()
    if not torch.equal(rows[place], expected):
        raise InvalidTraceError(
            f"return_home: {len(rows)} tokens came home, wanted each of the "
            f"{num_tokens} that began here once"
        )
    return came[place]


def _lines_of(token: torch.Tensor, here: torch.Tensor, width: int) -> torch.Tensor:
    """int32 [U, D]: the rows of each token in the order they came, which is by rank."""
    count = torch.bincount(token, minlength=len(here))
    order = token.argsort(stable=True)
    lines = torch.full((len(here), width), -1, dtype=torch.int32, device=token.device)
    place = torch.arange(len(token), device=token.device)
    start = (count.cumsum(0) - count)[token[order]]
    lines[token[order], place - start] = order.int()
    return lines
