"""The way back of tokens that follow their experts, on two levels.

Parts made in a node meet at its gateway for their token: the rank whose place in the
node is that of the rank where the token ends. Their sum crosses from there, once for
each node, as the evaluator counts (`moetuner.evaluation`). A gateway may know nothing
of a token, so its note goes with each part. Parts of one token are added up in the
order of their senders.

Legend: N rows that arrived, D of a note's ranks, W its numbers, P parts that come, U
tokens, H hidden.
"""

from __future__ import annotations

import torch

from moetuner.errors import InvalidTraceError
from moetuner.nn.way_back import (
    LANES,
    WayBack,
    numbers,
    ranks_of,
    resend,
    send_parts,
)
from moetuner.ops import ExchangeHandle, unpermute
from moetuner.ops._collectives import group_named


def sums_over_nodes(
    parts: torch.Tensor, way: WayBack, handle: ExchangeHandle
) -> torch.Tensor:
    """Sums [U, H] of all parts of the tokens that end here.

    Parameters
    ----------
    parts
        [N, H], of the rows that arrived.
    way, handle
        Of the same `dispatch`, which took two levels.

    Raises
    ------
    InvalidTraceError
        When two tokens that end here have the same key.

    Notes
    -----
    **The host waits** for the keys, for the rows of both hops, and for how many tokens
    a gateway has.
    """
    assert handle.between is not None
    inside, between = handle.group_name, handle.between.group_name
    in_node, nodes = (group_named(name).size() for name in (inside, between))
    ended = _number(way.ended())
    if bool((ended.diff() == 0).any()):
        raise InvalidTraceError(
            "follow: keys name a token twice: give those that the layer before "
            "returned, or None where tokens are at home"
        )

    came, notes = _hop(parts, way.notes, way.leaving // LANES % in_node, inside)
    lanes, number = _read(notes, way, handle)
    here, token = torch.unique(number, return_inverse=True)
    sums = _add_up(came, token, len(here), in_node)
    # Any part of a token will do: their notes are alike.
    part = torch.empty_like(here).scatter_(0, token, numbers(token))
    notes, lanes = (t.index_select(0, part) for t in (notes, lanes))

    came, notes = _hop(sums, notes, lanes // LANES // in_node, between)
    _, number = _read(notes, way, handle)
    return _add_up(came, torch.searchsorted(ended, number), len(ended), nodes)


def _hop(
    rows: torch.Tensor, notes: torch.Tensor, to: torch.Tensor, group_name: str
) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows and their notes, to a rank int32 [P, 1] of the group each."""
    sent = send_parts(rows, to, group_name)
    return sent.rows, resend(notes, sent.handle)


def _read(
    notes: torch.Tensor, way: WayBack, handle: ExchangeHandle
) -> tuple[torch.Tensor, torch.Tensor]:
    """Lanes int32 [P, 1] and tokens' numbers int64 [P], by notes [P, W]."""
    num_ranks = way.into.shape[1]  # in a note
    lanes, _, homes, *_ = torch.ops.moetuner.follow_lines(
        notes, notes[:0], num_ranks, *ranks_of(handle)
    )
    return lanes, _number(homes)


def _number(homes: torch.Tensor) -> torch.Tensor:
    """Of each token int64 [P], rising with home rank and row, int64 [P, 2]."""
    home, row = homes.unbind(dim=1)
    return home << 32 | row


def _add_up(
    rows: torch.Tensor, token: torch.Tensor, num_tokens: int, most: int
) -> torch.Tensor:
    """Sums [U, H] of rows [P, H] by the token int64 [P] that each is of, in order.

    No token has more than `most`.
    """
    by_token, order = token.sort(stable=True)
    begin = torch.searchsorted(by_token, torch.arange(num_tokens, device=token.device))
    turn = numbers(by_token) - begin.index_select(0, by_token)
    row_map = order.new_full((num_tokens, most), -1, dtype=torch.int32)
    row_map[by_token, turn] = order.int()
    return unpermute(rows, row_map)
