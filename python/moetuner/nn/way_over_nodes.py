"""The way back of tokens that follow their experts, on two levels.

Parts made in a node meet at its gateway for their token: the rank whose place in the
node is that of the rank where the token ends. Their sum crosses from there, once for
each node, as the evaluator counts (`moetuner.evaluation`). A gateway may know nothing
of a token, so its note goes with each part. Parts of one token are added up in the
order of their senders.

Legend: N rows that arrived, W numbers of a note, P parts that come, U tokens, H hidden.
"""

from __future__ import annotations

import torch

from moetuner.nn.way_back import LANES, WayBack, send_parts
from moetuner.ops import ExchangeHandle, unpermute
from moetuner.ops._collectives import group_named

_KEY = 4  # numbers of 16 bits that a note begins with; the lane is behind them


def sums_over_nodes(
    parts: torch.Tensor, way: WayBack, handle: ExchangeHandle, ended: torch.Tensor
) -> torch.Tensor:
    """Sums [U, H] of all parts of the tokens that end here.

    Parameters
    ----------
    parts
        [N, H], of the rows that arrived.
    way, handle
        Of the same `dispatch`, which took two levels.
    ended
        int64 [U], rising: keys of the tokens that end here.

    Notes
    -----
    **The host waits** for the rows of both hops, and for how many tokens a gateway has.
    """
    assert handle.between is not None
    inside = handle.group_name
    in_node = group_named(inside).size()
    place = _end(way.notes) % in_node
    came, notes = _hop(parts, way.notes, place, inside)
    here, token = torch.unique(_keys(notes), return_inverse=True)
    sums = _add_up(came, token, len(here), in_node)
    first = torch.empty_like(here).scatter_(0, token, _numbers(token))
    notes = notes.index_select(0, first)

    between = handle.between.group_name
    came, notes = _hop(sums, notes, _end(notes) // in_node, between)
    token = torch.searchsorted(ended, _keys(notes))
    return _add_up(came, token, len(ended), group_named(between).size())


def _hop(
    rows: torch.Tensor, notes: torch.Tensor, to: torch.Tensor, group_name: str
) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows and their notes, to a rank of the group each."""
    lanes = to.int()[:, None]
    return send_parts(rows, lanes, group_name), send_parts(notes, lanes, group_name)


def _add_up(
    rows: torch.Tensor, token: torch.Tensor, num_tokens: int, most: int
) -> torch.Tensor:
    """Sums [U, H] of rows [P, H] by the token int64 [P] that each is of, in order."""
    by_token, order = token.sort(stable=True)
    begin = torch.searchsorted(by_token, torch.arange(num_tokens, device=token.device))
    turn = _numbers(by_token) - begin.index_select(0, by_token)
    row_map = order.new_full((num_tokens, most), -1, dtype=torch.int32)
    row_map[by_token, turn] = order.int()
    return unpermute(rows, row_map)


def _end(notes: torch.Tensor) -> torch.Tensor:
    """Rank on which each token ends."""
    return notes[:, _KEY].long() // LANES


def _keys(notes: torch.Tensor) -> torch.Tensor:
    """Home rank and row of each token, in one number."""
    low, high, row_low, row_high = notes[:, :_KEY].long().unbind(dim=1)
    return (high << 16 | low) << 32 | row_high << 16 | row_low


def _numbers(like: torch.Tensor) -> torch.Tensor:
    return torch.arange(len(like), device=like.device)
