"""A batch that all ranks of a group have: each takes its share, and gets all sums back.

Legend: T tokens of the batch, t of this rank's share, G ranks.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist

from moetuner.ops._collectives import group_named
from moetuner.ops._effects import keep_in_order, teach_inductor


def own_rows(batch: list[torch.Tensor], group_name: str) -> list[torch.Tensor]:
    """Rows [t, ...] of this rank, of tensors [T, ...] that all ranks have.

    Blocks are equally large; the last ranks have fewer rows, or none. The gradient is
    gathered from all ranks.
    """
    return torch.ops.moetuner.own_rows.default(batch, group_name)  # type: ignore[no-any-return,unused-ignore]


def all_rows(share: torch.Tensor, num_rows: int, group_name: str) -> torch.Tensor:
    """The rows [T, ...] of all ranks, of which this one has `own_rows`.

    The gradient is this rank's rows of it: all ranks have the same.
    """
    return torch.ops.moetuner.all_rows.default(share, num_rows, group_name)  # type: ignore[no-any-return,unused-ignore]


def in_common(parameter: torch.Tensor, group_name: str) -> torch.Tensor:
    """The same values; the gradient is the sum of what all ranks make of their rows."""
    return torch.ops.moetuner.in_common.default(parameter, group_name)  # type: ignore[no-any-return,unused-ignore]


@torch.library.custom_op("moetuner::own_rows", mutates_args=())
def _own_rows(batch: list[torch.Tensor], group_name: str) -> list[torch.Tensor]:
    return [_take(tensor, group_named(group_name)) for tensor in batch]


def _take(rows: torch.Tensor, group: Any) -> torch.Tensor:
    size = -(-len(rows) // group.size())
    mine = rows[group.rank() * size :][:size]
    return mine.clone(memory_format=torch.contiguous_format)


@_own_rows.register_fake
def _fake_own_rows(batch: list[torch.Tensor], group_name: str) -> list[torch.Tensor]:
    group, num_rows = group_named(group_name), batch[0].shape[0]
    # Were it an expression of T, a graph would hold for those T alone where it is
    # neither zero nor one.
    share: int | torch.SymInt = num_rows
    if isinstance(num_rows, int):
        size = -(-num_rows // group.size())
        share = max(min(size, num_rows - group.rank() * size), 0)
    elif group.size() > 1:
        share = torch.library.get_ctx().new_dynamic_size()
    return [rows.new_empty(share, *rows.shape[1:]) for rows in batch]


@torch.library.custom_op("moetuner::own_rows_again", mutates_args=())
def _own_rows_again(rows: torch.Tensor, share: int, group_name: str) -> torch.Tensor:
    """For gradients, whose compiler knows t already."""
    return _take(rows, group_named(group_name))


@_own_rows_again.register_fake
def _fake_own_rows_again(
    rows: torch.Tensor, share: int, group_name: str
) -> torch.Tensor:
    return rows.new_empty(share, *rows.shape[1:])


@torch.library.custom_op("moetuner::all_rows", mutates_args=())
def _all_rows(share: torch.Tensor, num_rows: int, group_name: str) -> torch.Tensor:
    group = group_named(group_name)
    size = -(-num_rows // group.size())
    mine = share.new_zeros(size, *share.shape[1:])
    mine[: len(share)] = share
    out = share.new_empty(group.size(), *mine.shape)
    dist.all_gather(list(out), mine, group=group)
    return out.flatten(0, 1)[:num_rows].clone()


@_all_rows.register_fake
def _fake_all_rows(share: torch.Tensor, num_rows: int, group_name: str) -> torch.Tensor:
    teach_inductor()
    return share.new_empty(num_rows, *share.shape[1:])


@torch.library.custom_op("moetuner::in_common", mutates_args=())
def _in_common(parameter: torch.Tensor, group_name: str) -> torch.Tensor:
    return parameter.clone()


@_in_common.register_fake
def _fake_in_common(parameter: torch.Tensor, group_name: str) -> torch.Tensor:
    return torch.empty_like(parameter)


@torch.library.custom_op("moetuner::sum_over_ranks", mutates_args=())
def _sum_over_ranks(value: torch.Tensor, group_name: str) -> torch.Tensor:
    total = value.clone(memory_format=torch.contiguous_format)
    dist.all_reduce(total, group=group_named(group_name))
    return total


@_sum_over_ranks.register_fake
def _fake_sum_over_ranks(value: torch.Tensor, group_name: str) -> torch.Tensor:
    teach_inductor()
    return value.new_empty(value.shape)


def _keep(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    given = inputs[0] if isinstance(inputs[0], torch.Tensor) else inputs[0][0]
    ctx.num_rows, ctx.group_name = given.shape[0], inputs[-1]


def _gather_gradients(ctx: Any, grads: list[torch.Tensor | None]) -> Any:
    whole = [
        None if grad is None else all_rows(grad, ctx.num_rows, ctx.group_name)
        for grad in grads
    ]
    return whole, None


def _own_gradient(ctx: Any, grad: torch.Tensor) -> Any:
    run = torch.ops.moetuner.own_rows_again.default
    return run(grad, ctx.num_rows, ctx.group_name), None, None


def _sum_gradient(ctx: Any, grad: torch.Tensor) -> Any:
    return torch.ops.moetuner.sum_over_ranks.default(grad, ctx.group_name), None


_own_rows.register_autograd(_gather_gradients, setup_context=_keep)
_all_rows.register_autograd(_own_gradient, setup_context=_keep)
_in_common.register_autograd(_sum_gradient, setup_context=_keep)

for _name in ("all_rows", "sum_over_ranks"):
    keep_in_order(_name)
