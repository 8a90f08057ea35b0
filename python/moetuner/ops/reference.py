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


def _chosen(topk_ids: torch.Tensor, num_experts: int) -> torch.Tensor:
    """How often each token lists each expert, int64 [T, E]; padding is left out."""
    experts = torch.arange(num_experts, device=topk_ids.device)
    return (topk_ids[:, :, None] == experts).sum(dim=1)
