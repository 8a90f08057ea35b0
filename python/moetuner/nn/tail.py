"""Which expert a row belongs to, and rows that belong to none.

Behind the last end offset `moetuner.ops.dispatch` in its fixed form, and
`torch.nn.functional.grouped_mm` always, leave whatever the memory held. Nothing may be
made of such rows, not even times zero: zero times NaN is NaN. Legend: R rows, E
experts.
"""

from __future__ import annotations

import torch


def expert_of_rows(num_rows: int, end_offsets: torch.Tensor) -> torch.Tensor:
    """Expert of each row, int64 [R]; E where the row is undefined.

    Parameters
    ----------
    num_rows
        R.
    end_offsets
        int32 [E], from `moetuner.ops.dispatch` or `moetuner.ops.permute`.
    """
    row = torch.arange(num_rows, dtype=torch.int32, device=end_offsets.device)
    return torch.searchsorted(end_offsets, row, right=True)


def per_expert(
    values: torch.Tensor, num_rows: int, end_offsets: torch.Tensor
) -> torch.Tensor:
    """The value of each row's expert; zeros where the row is undefined.

    The gradient of an expert's value comes from its own rows alone.

    Parameters
    ----------
    values
        [E, ...], a bias or a scale.
    num_rows, end_offsets
        As for `expert_of_rows`.

    Returns
    -------
    torch.Tensor
        [R, ...].

    Examples
    --------
    >>> import torch
    >>> from moetuner.nn import per_expert
    >>> ends = torch.tensor([2, 3], dtype=torch.int32)
    >>> per_expert(torch.tensor([5.0, 7.0]), 5, ends).tolist()
    [5.0, 5.0, 7.0, 0.0, 0.0]
    """
    table = torch.cat([values, values.new_zeros(1, *values.shape[1:])])
    return table[expert_of_rows(num_rows, end_offsets)]


def defined_rows(rows: torch.Tensor, end_offsets: torch.Tensor) -> torch.Tensor:
    """The rows, with zeros where they are undefined; so is their gradient.

    For whatever has parameters that all rows share, as a norm has: put one before it,
    and one behind it where `grouped_linear` follows, whose gradients of such rows are
    undefined too.

    Parameters
    ----------
    rows
        [R, ...] in expert order.
    end_offsets
        int32 [E].
    """
    row = torch.arange(rows.shape[0], dtype=torch.int32, device=rows.device)
    defined = (row < end_offsets[-1]).view(-1, *[1] * (rows.dim() - 1))
    return torch.where(defined, rows, 0)
