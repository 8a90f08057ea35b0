"""`dispatch` and `combine` again in plain torch and torch.distributed: slow, readable.

Exact form, on any backend with `all_to_all_single`; differentiable. Legend: T tokens
here, K top-k, G ranks, S slots per rank, D = min(K, G), N rows that arrive, M (token,
expert) rows here, H hidden.
"""

from __future__ import annotations

import torch

from moetuner.ops._collectives import (
    all_to_all_rows,
    exchange_counts,
    group_named,
    slots_of,
)
from moetuner.ops.dispatch import Dispatched, ExchangeHandle


def dispatch(
    x: torch.Tensor,
    topk_ids: torch.Tensor,
    topk_weights: torch.Tensor,
    candidates: torch.Tensor,
    num_candidates: torch.Tensor,
    slots_per_rank: int,
    group_name: str,
) -> Dispatched:
    """Twin of `moetuner.ops.dispatch` in its exact form."""
    group = group_named(group_name)
    num_ranks, num_tokens = group.size(), len(x)
    slots = slots_of(topk_ids, candidates, num_candidates)
    goes_to = slots // slots_per_rank  # -1 stays -1
    visits = (goes_to[:, None, :] == torch.arange(num_ranks)[:, None]).any(dim=2)

    rank, token = visits.T.nonzero(as_tuple=True)  # by rank, then in token order
    sent = visits.sum(dim=0)
    received = exchange_counts(sent, group)
    send_map = torch.full((num_tokens, min(topk_ids.shape[1], num_ranks)), -1)
    column = visits.long().cumsum(dim=1)[token, rank] - 1
    send_map[token, column] = torch.arange(len(token))

    arrived, arrived_weights = (
        all_to_all_rows(tensor[token], sent, received, group)
        for tensor in (x, topk_weights.float())
    )
    local = all_to_all_rows(slots[token], sent, received, group)
    local = local - group.rank() * slots_per_rank
    here = (local >= 0) & (local < slots_per_rank)
    slot = local[here]  # choices that own a row, by arrival and k
    order = slot.argsort(stable=True)
    row, _ = here.nonzero(as_tuple=True)
    recv_map = torch.full(local.shape, -1)
    place = torch.empty_like(order)
    place[order] = torch.arange(len(order))
    recv_map[here] = place
    return Dispatched(
        rows=arrived[row[order]],
        end_offsets=torch.bincount(slot, minlength=slots_per_rank).cumsum(0).int(),
        handle=ExchangeHandle(
            recv_map=recv_map.int(),
            recv_weights=torch.where(here, arrived_weights, 0),
            send_map=send_map.int(),
            splits=torch.stack([sent, received]),
            group_name=group_name,
        ),
    )


def combine(rows: torch.Tensor, handle: ExchangeHandle) -> torch.Tensor:
    """Twin of `moetuner.ops.combine`: float32 sums, rounded for the wire."""
    group, (sent, received) = group_named(handle.group_name), handle.splits
    at_expert = sum_rows(rows, handle.recv_map, handle.recv_weights)
    returned = all_to_all_rows(at_expert, received, sent, group)
    return sum_rows(returned, handle.send_map, torch.ones(handle.send_map.shape))


def sum_rows(
    rows: torch.Tensor, row_map: torch.Tensor, weights: torch.Tensor
) -> torch.Tensor:
    """Weighted float32 sum of each line's rows in the order of its columns."""
    total = torch.zeros(len(row_map), rows.shape[1])
    for column, weight in zip(row_map.T.long(), weights.T, strict=True):
        there = column >= 0
        picked = rows[column[there]].float() * weight[there, None]
        total = total.index_add(0, there.nonzero().flatten(), picked)
    return total.to(rows.dtype)
