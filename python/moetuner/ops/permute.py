"""Tokens to expert order: from the router's ids to rows, map and offsets in one pass.

Legend: T tokens, K top-k, E experts that own rows here, R rows, H hidden.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from moetuner.ops._devices import same_device
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

    def num_dropped(self) -> torch.Tensor:
        """int64 [], choices that found no row because of ``num_out_tokens``."""
        return (self.row_map >= len(self.rows)).sum()


@ranged
def permute(
    x: torch.Tensor,
    topk_ids: torch.Tensor,
    num_experts: int,
    expert_map: torch.Tensor | None = None,
    alignment: int = 1,
    *,
    num_out_tokens: int | None = None,
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
        int32 or int64 [T, K], contiguous. Ids outside the experts are padding; beyond
        int32 they are refused, on CUDA by a device assertion. K is at most 256 on CUDA.
    num_experts
        E, the number of experts that own rows here, at most 4096 on CUDA.
    expert_map
        int32 [ids], contiguous: which of the E experts an id is here, -1 for one that
        lives elsewhere. None: the id itself.
    alignment
        Each expert's rows start at a multiple of this many rows.
    num_out_tokens
        The most rows that there may be: choices whose rows stand behind are dropped,
        those of the last experts first. Their entries of ``row_map`` are R or more,
        which `unpermute` leaves out, and ``Permuted.num_dropped`` counts them.
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
    if num_out_tokens is not None and num_out_tokens < 0:
        raise ValueError(
            f"permute: num_out_tokens must not be negative, got {num_out_tokens}"
        )
    if scales is None and load is None:
        return _limited(Permuted(*ops.default(*routing)), num_out_tokens)
    counters = {
        "load": load,
        "coactivation": coactivation,
        "previous_topk_ids": previous_topk_ids,
        "transitions": transitions,
    }
    if scales is None:
        return _limited(Permuted(*ops.counted(*routing, **counters)), num_out_tokens)
    found = Permuted(*ops.scaled(*routing, scales=scales, **counters))
    return _limited(found, num_out_tokens)


def _limited(found: Permuted, limit: int | None) -> Permuted:
    """The first rows alone."""
    if limit is None:
        return found
    scales = None if found.row_scales is None else found.row_scales[:limit]
    ends = found.end_offsets.clamp(max=limit)
    return Permuted(found.rows[:limit], found.row_map, ends, scales)


def choices_to_rows(
    values: torch.Tensor, row_map: torch.Tensor, num_rows: int
) -> torch.Tensor:
    """Give each row what belongs to its choice, as its probability.

    Parameters
    ----------
    values
        [T, K], any dtype.
    row_map
        int32 [T, K], from `permute`; entries outside [0, R) have no row.
    num_rows
        R.

    Returns
    -------
    torch.Tensor
        [R]; 0 for rows without a token. Differentiable in values.

    Examples
    --------
    >>> import torch
    >>> from moetuner.ops import choices_to_rows, permute
    >>> ids = torch.tensor([[0, 2], [2, 1]])
    >>> found = permute(torch.ones(2, 1), ids, num_experts=3)
    >>> weights = torch.tensor([[0.75, 0.25], [0.5, 0.5]])
    >>> choices_to_rows(weights, found.row_map, len(found.rows)).tolist()
    [0.75, 0.5, 0.25, 0.5]
    """
    if values.shape != row_map.shape:
        raise ValueError(
            f"choices_to_rows: values must be {list(row_map.shape)} like row_map, got "
            f"{list(values.shape)}"
        )
    outside = (row_map < 0) | (row_map >= num_rows)
    place = row_map.masked_fill(outside, num_rows).flatten().long()
    rows = values.new_zeros(num_rows + 1)  # one more for those that have none
    return rows.scatter(0, place, values.flatten())[:num_rows]


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
    same_device("permute", x, topk_ids=topk_ids, expert_map=expert_map)
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
    **counters: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    same_device("permute", x, **counters)
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
    **counters: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    same_device("permute", x, scales=scales, **counters)
    rows, row_map, end_offsets = _fake(x, topk_ids, num_experts, expert_map, alignment)
    row_scales = scales.new_empty(rows.shape[0], scales.shape[1])
    return rows, row_map, end_offsets, row_scales
