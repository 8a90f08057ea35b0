"""FP8 rows and their scales as one row: they travel together, by any transport.

Legend: T tokens, H hidden, C scales of a row, M rows that arrived, W bytes of a row.

    [ x: H bytes ][ to 16 ][ scales: C values ][ to 16, or where rows are long, to 128 ]
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from collections.abc import Sequence

_ALIGNMENT = 16  # bytes: what grouped matrix products ask of rows
_LINE = 128  # where long rows begin: elsewhere they touch more lines of memory and link
_LONG = 2048  # bytes of a row, to which a line more is little


def join(x: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
    """Rows [T, W] of x's dtype, of x [T, H] and scales [T, C].

    Raises
    ------
    ValueError, TypeError
        Naming the argument, what was wanted and what came.
    """
    if x.dtype.itemsize != 1 or not x.dtype.is_floating_point:
        raise TypeError(f"dispatch: scales are for rows of FP8, got x of {x.dtype}")
    if scales.dim() != 2 or len(scales) != len(x):
        raise ValueError(
            f"dispatch: scales must be [{len(x)}, scales per token], got "
            f"{list(scales.shape)}"
        )
    if scales.device != x.device:
        raise ValueError(
            f"dispatch: scales is on {scales.device}, x on {x.device}: all must be on "
            f"one device"
        )
    if scales.stride(1) != 1:
        scales = scales.clone(memory_format=torch.contiguous_format)
    parts = [_padded(each.view(torch.uint8)) for each in (x, scales)]
    width = sum(each.shape[1] for each in parts)
    if width > _LONG and width % _LINE:  # nobody reads what is there
        parts.append(parts[0].new_empty(len(x), -width % _LINE))
    word = _widest(parts)
    return torch.cat([each.view(word) for each in parts], dim=1).view(x.dtype)


def part(
    rows: torch.Tensor, hidden: int, num_scales: int, dtype: torch.dtype
) -> Sequence[torch.Tensor]:
    """Rows [M, H] and scales [M, C] of `dtype`, both as views of `rows` [M, W]."""
    first = -(-hidden // _ALIGNMENT) * _ALIGNMENT
    scales = rows[:, first : first + num_scales * dtype.itemsize]
    return rows[:, :hidden], scales.view(dtype)


def _widest(parts: Sequence[torch.Tensor]) -> torch.dtype:
    """What `cat` copies at a time: the widest that fits all parts; bytes are slow.

    A compiler makes its own code of bytes, and does not know offsets.
    """
    if torch.compiler.is_compiling():
        return torch.uint8
    if any(each.stride(1) != 1 for each in parts):
        return torch.uint8
    for word in (torch.complex128, torch.int64, torch.int32):
        sizes = [(each.stride(0), each.storage_offset()) for each in parts]
        if all(size % word.itemsize == 0 for pair in sizes for size in pair):
            return word
    return torch.uint8


def _padded(values: torch.Tensor) -> torch.Tensor:
    missing = -values.shape[1] % _ALIGNMENT
    if missing == 0:  # `pad` would copy them
        return values
    return torch.nn.functional.pad(values, (0, missing))
