"""Tokens to expert order: from the router's ids to rows, map and offsets in one pass.

Legend: T tokens, K top-k, E experts that own rows here, R rows, H hidden.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from moetuner.ops._ranges import ranged


class Permuted(NamedTuple):
    """Rows in expert order, and the way back."""

    rows: torch.Tensor
    """[R, H] of x's dtype; rows without a token are zero."""
    row_map: torch.Tensor
    """int32 [T, K], the row of each choice; -1: the expert is not here."""
    end_offsets: torch.Tensor
    """int32 [E], end of each expert's rows, padding included: `offs` of
    `torch.nn.functional.grouped_mm`."""
    row_scales: torch.Tensor | None = None
    """[R, S] of the scales' dtype, where scales were given."""


@ranged
def permute(
    x: torch.Tensor,
    topk_ids: torch.Tensor,
    num_experts: int,
    expert_map: torch.Tensor | None = None,
    alignment: int = 1,
    *,
    scales: torch.Tensor | None = None,
    load: torch.Tensor | None = None,
    coactivation: torch.Tensor | None = None,
    previous_topk_ids: torch.Tensor | None = None,
    transitions: torch.Tensor | None = None,
) -> Permuted:
    """Copy each token's row to its experts' rows, which stand one after another.

    Parameters
    ----------
    x
        [T, H], contiguous: float32, bfloat16, float16, float8_e4m3fn or float8_e5m2.
    topk_ids
        int32 or int64 [T, K], contiguous. Ids outside the experts are padding. K is at
        most 256 on CUDA.
    num_experts
        E, the number of experts that own rows here, at most 4096 on CUDA.
    expert_map
        int32 [ids], contiguous: which of the E experts an id is here, -1 for one that
        lives elsewhere. None: the id itself.
    alignment
        Each expert's rows start at a multiple of this many rows.
    scales
        [T, S], contiguous, any dtype: copied to `row_scales` as x is to `rows`.
    load, coactivation, previous_topk_ids, transitions
        Counters of `moetuner.ops.count_routing`, added to in the same pass, by id.

    Returns
    -------
    Permuted
        R is ``T * K + min(E, T * K) * (alignment - 1)``, rounded down to a multiple of
        the alignment: enough for any routing, so that no size is read from the device.

    Raises
    ------
    ValueError, TypeError
        Naming the argument, what was wanted and what came.

    Notes
    -----
    Stable: inside an expert, rows stand in the order of tokens and k. Differentiable in
    x, in backward mode, unless it is FP8 or there are scales. No host synchronisation;
    captured by CUDA graphs.

    Examples
    --------
    >>> import torch
    >>> from moetuner.ops import permute, unpermute
    >>> x = torch.tensor([[1.0], [2.0], [3.0]])
    >>> ids = torch.tensor([[0, 2], [2, 1], [2, -1]])
    >>> rows, row_map, end_offsets, _ = permute(x, ids, num_experts=3)
    >>> rows.flatten().tolist(), end_offsets.tolist()
    ([1.0, 2.0, 1.0, 2.0, 3.0, 0.0], [1, 2, 5])
    >>> row_map.tolist()
    [[0, 2], [3, 1], [4, -1]]
    >>> unpermute(rows, row_map).flatten().tolist()
    [2.0, 4.0, 3.0]
    """
    ops = torch.ops.moetuner.permute
    routing = (x, topk_ids, num_experts, expert_map, alignment)
    if load is None and (coactivation is not None or transitions is not None):
        raise ValueError(
            "permute: coactivation and transitions are counted beside load, got no load"
        )
    if scales is None and load is None:
        return Permuted(*ops.default(*routing))
    counters = {
        "load": load,
        "coactivation": coactivation,
        "previous_topk_ids": previous_topk_ids,
        "transitions": transitions,
    }
    if scales is None:
        return Permuted(*ops.counted(*routing, **counters))
    return Permuted(*ops.scaled(*routing, scales=scales, **counters))


def _static_rows(topk_ids: torch.Tensor, num_experts: int, alignment: int) -> int:
    """R; csrc/torch/permute.cpp says the same."""
    choices = topk_ids.numel()
    limit = torch.sym_min(num_experts, choices)  # type: ignore[no-untyped-call,unused-ignore]
    padded = choices + limit * (alignment - 1)
    return padded // alignment * alignment  # type: ignore[no-any-return,unused-ignore]


@torch.library.register_fake("moetuner::permute")  # type: ignore[untyped-decorator,unused-ignore]
def _fake(
    x: torch.Tensor,
    topk_ids: torch.Tensor,
    num_experts: int,
    expert_map: torch.Tensor | None = None,
    alignment: int = 1,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    num_rows = _static_rows(topk_ids, num_experts, alignment)
    return (
        x.new_empty(num_rows, x.shape[1]),
        x.new_empty(topk_ids.shape, dtype=torch.int32),
        x.new_empty(num_experts, dtype=torch.int32),
    )


@torch.library.register_fake("moetuner::permute.counted")  # type: ignore[untyped-decorator,unused-ignore]
def _fake_counted(
    x: torch.Tensor,
    topk_ids: torch.Tensor,
    num_experts: int,
    expert_map: torch.Tensor | None = None,
    alignment: int = 1,
    **_counters: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    return _fake(x, topk_ids, num_experts, expert_map, alignment)  # type: ignore[no-any-return,unused-ignore]


@torch.library.register_fake("moetuner::permute.scaled")  # type: ignore[untyped-decorator,unused-ignore]
def _fake_scaled(
    x: torch.Tensor,
    topk_ids: torch.Tensor,
    num_experts: int,
    expert_map: torch.Tensor | None = None,
    alignment: int = 1,
    *,
    scales: torch.Tensor,
    **_counters: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    rows, row_map, end_offsets = _fake(x, topk_ids, num_experts, expert_map, alignment)
    row_scales = scales.new_empty(rows.shape[0], scales.shape[1])
    return rows, row_map, end_offsets, row_scales
