"""The way back of `dispatch`: each token's experts' rows, weighted, summed, at home.

Legend: T tokens here, K top-k, G ranks, D = min(K, G), N rows that arrived, M (token,
expert) rows here, H hidden.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from moetuner.ops._devices import same_device
from moetuner.ops._effects import keep_in_order, teach_inductor
from moetuner.ops._ranges import ranged

if TYPE_CHECKING:
    from moetuner.ops.dispatch import ExchangeHandle


@ranged
def combine(
    rows: torch.Tensor, handle: ExchangeHandle, *, weighted: bool = True
) -> torch.Tensor:
    """Sum each token's rows at their rank, send the sums home, and sum those.

    Every rank of the group calls this.

    Parameters
    ----------
    rows
        [M, H], contiguous, float32, bfloat16 or float16: what the experts made of
        `Dispatched.rows`. Those behind the last end offset are not read.
    handle
        Of the same `dispatch`.
    weighted
        Whether rows are multiplied by the weights that travelled; otherwise all are
        one.

    Returns
    -------
    torch.Tensor
        [T, H] of the rows' dtype. Products and sums are float32, first in the order of
        k, then of ranks (with two levels: of the ranks of a node at the gateway, then
        of nodes); what travels is rounded to the rows' dtype between. The same bits on
        every run.

    Raises
    ------
    ValueError, TypeError
        Naming the argument, what was wanted and what came.

    Notes
    -----
    Differentiable once, in backward mode, in rows and the weights. Compiled, it is
    never removed or reordered.
    """
    return torch.ops.moetuner.combine.default(  # type: ignore[no-any-return,unused-ignore]
        rows,
        handle.recv_map,
        handle.recv_weights if weighted else None,
        handle.send_maps,
        handle.all_splits,
        handle.groups,
    )


@torch.library.register_fake("moetuner::combine")  # type: ignore[untyped-decorator,unused-ignore]
def _fake(
    rows: torch.Tensor,
    recv_map: torch.Tensor,
    recv_weights: torch.Tensor | None,
    send_maps: list[torch.Tensor],
    splits: list[torch.Tensor],
    groups: list[str],
) -> torch.Tensor:
    teach_inductor()
    same_device("combine", rows, **_tables(recv_map, recv_weights, send_maps))
    return rows.new_empty(send_maps[0].shape[0], rows.shape[1])


@torch.library.register_fake("moetuner::dispatch_backward")  # type: ignore[untyped-decorator,unused-ignore]
def _fake_dispatch_backward(
    grad_rows: torch.Tensor | None,
    grad_recv_weights: torch.Tensor | None,
    recv_map: torch.Tensor,
    send_maps: list[torch.Tensor],
    splits: list[torch.Tensor],
    groups: list[str],
) -> tuple[torch.Tensor, ...]:
    teach_inductor()

    def at_home(grad: torch.Tensor | None) -> torch.Tensor:
        if grad is None:
            return recv_map.new_empty(0)
        same_device("dispatch_backward", grad, **_tables(recv_map, None, send_maps))
        return grad.new_empty(send_maps[0].shape[0], grad.shape[1])

    return at_home(grad_rows), at_home(grad_recv_weights)


def _tables(
    recv_map: torch.Tensor,
    recv_weights: torch.Tensor | None,
    send_maps: list[torch.Tensor],
) -> dict[str, torch.Tensor | None]:
    """What comes with the rows, by name."""
    maps = {f"send_maps[{hop}]": each for hop, each in enumerate(send_maps)}
    return {"recv_map": recv_map, "recv_weights": recv_weights, **maps}


@torch.library.register_fake("moetuner::combine_backward")  # type: ignore[untyped-decorator,unused-ignore]
def _fake_backward(
    grad_out: torch.Tensor,
    recv_map: torch.Tensor,
    recv_weights: torch.Tensor | None,
    send_maps: list[torch.Tensor],
    splits: list[torch.Tensor],
    groups: list[str],
    num_rows: int,
    rows: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    teach_inductor()
    others = _tables(recv_map, recv_weights, send_maps)
    same_device("combine_backward", grad_out, rows=rows, **others)
    grad_rows = grad_out.new_empty(num_rows, grad_out.shape[1])
    if rows is None or recv_weights is None:
        return grad_rows, grad_out.new_empty(0)
    return grad_rows, torch.empty_like(recv_weights)


@torch.library.register_fake("moetuner::resend")  # type: ignore[untyped-decorator,unused-ignore]
def _fake_resend(
    rows: torch.Tensor,
    recv_map: torch.Tensor,
    send_maps: list[torch.Tensor],
    splits: list[torch.Tensor],
    groups: list[str],
) -> torch.Tensor:
    teach_inductor()
    same_device("resend", rows, **_tables(recv_map, None, send_maps))
    return rows.new_empty(recv_map.shape[0], rows.shape[1])


for _name in ("combine", "combine_backward", "dispatch_backward", "resend"):
    keep_in_order(_name)
