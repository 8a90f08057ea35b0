"""Small exchanges in plain torch.distributed, and the slots that choices go to.

Legend: T tokens here, K top-k, E experts, R most slots of an expert, G ranks.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.distributed_c10d as c10d

# Its functions have the world as a default argument: imported (by an optimizer) only
# once there is a world, they keep it for ever, and Gloo's threads, which outlive the
# interpreter then, abort the process at its end now and then.
import torch.distributed.nn.functional


def slots_of(
    topk_ids: torch.Tensor, candidates: torch.Tensor, num_candidates: torch.Tensor
) -> torch.Tensor:
    """Slot of each choice, int64 [T, K]; -1: padding."""
    ids = topk_ids.long()
    inside = ids.clamp(0, len(num_candidates) - 1)
    token = torch.arange(len(ids), device=ids.device)[:, None]
    turn = token % num_candidates[inside]
    return candidates[inside, turn].long().masked_fill_(inside != ids, -1)


def group_named(name: str) -> Any:
    """The process group of that name.

    Modules keep the name: a group can be neither copied nor saved.
    """
    groups: Any = c10d
    return groups._resolve_process_group(name)


def exchange_counts(sent: torch.Tensor, group: Any) -> torch.Tensor:
    """What every rank sends to this one, int64 [G]."""
    received = torch.empty_like(sent)
    dist.all_to_all_single(received, sent, group=group)
    return received


def all_to_all_rows(
    rows: torch.Tensor, sent: torch.Tensor, received: torch.Tensor, group: Any
) -> torch.Tensor:
    """Rows by destination to rows by source; differentiable."""
    out: torch.Tensor = _exchange(rows, received.tolist(), sent.tolist(), group)
    return out


class _AllToAll(torch.autograd.Function):
    """The gradient takes the way back."""

    @staticmethod
    def forward(
        ctx: Any, rows: torch.Tensor, received: list[int], sent: list[int], group: Any
    ) -> torch.Tensor:
        ctx.way = received, sent, group
        out = rows.new_empty(sum(received), *rows.shape[1:])
        dist.all_to_all_single(out, rows.contiguous(), received, sent, group=group)
        return out

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> Any:
        received, sent, group = ctx.way
        return _exchange(grads[0], sent, received, group), None, None, None


_exchange: Any = _AllToAll.apply
