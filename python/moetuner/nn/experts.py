"""What experts compute on rows in expert order.

Legend: R rows, E experts, I inputs, O outputs.
"""

from __future__ import annotations

import torch


def grouped_linear(
    rows: torch.Tensor,
    weight: torch.Tensor,
    end_offsets: torch.Tensor,
    bias: torch.Tensor | None = None,
    *,
    is_transposed: bool = False,
) -> torch.Tensor:
    """Apply each expert's linear map to its rows.

    Parameters
    ----------
    rows
        [R, I] in expert order, from `moetuner.ops.permute`; cast to the weight's dtype.
    weight
        [E, O, I], or [E, I, O] where ``is_transposed``.
    end_offsets
        int32 [E], from `moetuner.ops.permute`.
    bias
        [E, O] or None.

    Returns
    -------
    torch.Tensor
        [R, O] of the weight's dtype. Rows behind the last expert's are whatever the
        memory held; `moetuner.ops.unpermute` never reads them.

    Raises
    ------
    RuntimeError
        From `torch.nn.functional.grouped_mm`, where I or O is no multiple of 16 bytes.

    Examples
    --------
    >>> import torch
    >>> from moetuner.nn import grouped_linear
    >>> rows = torch.ones(3, 4)
    >>> weight = torch.stack([torch.eye(4), 10 * torch.eye(4)])
    >>> ends = torch.tensor([2, 3], dtype=torch.int32)
    >>> grouped_linear(rows, weight, ends)[:, 0].tolist()
    [1.0, 1.0, 10.0]
    """
    matrix = weight if is_transposed else weight.transpose(-2, -1)
    out = torch.nn.functional.grouped_mm(
        rows.to(matrix.dtype), matrix, offs=end_offsets
    )
    if bias is None:
        return out
    every_row = torch.arange(len(rows), dtype=torch.int32, device=rows.device)
    expert = torch.searchsorted(end_offsets, every_row, right=True)
    return out + bias[expert.clamp_(max=len(bias) - 1)]
