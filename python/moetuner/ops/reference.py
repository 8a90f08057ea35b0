"""Every op again in plain torch: slow, readable, and what the tests compare with."""

from __future__ import annotations

import torch


def count_routing(
    topk_ids: torch.Tensor,
    load: torch.Tensor,
    coactivation: torch.Tensor | None = None,
    previous_topk_ids: torch.Tensor | None = None,
    transitions: torch.Tensor | None = None,
) -> None:
    """Twin of `moetuner.ops.count_routing` by one-hot matrices [T, E]."""
    here = _chosen(topk_ids, load.numel())
    load += here.sum(dim=0)
    if coactivation is not None:
        coactivation += here.T @ here
    if transitions is not None and previous_topk_ids is not None:
        transitions += _chosen(previous_topk_ids, load.numel()).T @ here


def permute(
    x: torch.Tensor,
    topk_ids: torch.Tensor,
    num_experts: int,
    expert_map: torch.Tensor | None = None,
    alignment: int = 1,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Twin of `moetuner.ops.permute` by a stable sort of the choices."""
    num_ids = num_experts if expert_map is None else len(expert_map)
    expert = topk_ids.flatten().long()
    expert[(expert < 0) | (expert >= num_ids)] = num_ids
    lookup = torch.arange(num_ids) if expert_map is None else expert_map.long()
    lookup = torch.cat([lookup.to(x.device), torch.tensor([-1], device=x.device)])
    expert = lookup[expert]
    expert[(expert < 0) | (expert >= num_experts)] = num_experts

    count = torch.bincount(expert, minlength=num_experts + 1)[:-1]
    size = (count + alignment - 1) // alignment * alignment
    end = size.cumsum(0)
    order = expert.argsort(stable=True)[: int(count.sum())]  # choices that own a row
    owner = expert[order]
    rank = torch.arange(len(order), device=x.device) - (count.cumsum(0) - count)[owner]
    row = (end - size)[owner] + rank

    choices = topk_ids.numel()
    num_rows = choices + min(num_experts, choices) * (alignment - 1)
    rows = x.new_zeros(num_rows // alignment * alignment, x.shape[1])
    rows[row] = x[order // topk_ids.shape[1]]
    row_map = torch.full((choices,), -1, dtype=torch.int32, device=x.device)
    row_map[order] = row.int()
    return rows, row_map.view(topk_ids.shape), end.int()


def unpermute(
    rows: torch.Tensor, row_map: torch.Tensor, weights: torch.Tensor | None = None
) -> torch.Tensor:
    """Twin of `moetuner.ops.unpermute` by a gather of all rows, in their dtype."""
    there = (row_map >= 0) & (row_map < len(rows))
    gathered = (
        rows[row_map.long().clamp(0, max(len(rows) - 1, 0))]
        if len(rows)
        else (rows.new_zeros(*row_map.shape, rows.shape[1]))
    )
    factor = there.to(rows.dtype) if weights is None else weights * there
    return (torch.where(there[..., None], gathered, 0) * factor[..., None]).sum(dim=1)


def _chosen(topk_ids: torch.Tensor, num_experts: int) -> torch.Tensor:
    """How often each token lists each expert, int64 [T, E]; padding is left out."""
    experts = torch.arange(num_experts, device=topk_ids.device)
    return (topk_ids[:, :, None] == experts).sum(dim=1)
