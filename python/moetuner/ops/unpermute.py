"""Back to token order: each token's rows, weighted and summed.

Legend: T tokens, K top-k, R rows, H hidden.
"""

from __future__ import annotations

import torch

from moetuner.ops._devices import same_device
from moetuner.ops._ranges import ranged


@ranged
def unpermute(
    rows: torch.Tensor,
    row_map: torch.Tensor,
    weights: torch.Tensor | None = None,
    num_tokens: int | None = None,
) -> torch.Tensor:
    """Sum the rows of each token, times its weights: the way back from `permute`.

    Parameters
    ----------
    rows
        [R, H], contiguous, float32, bfloat16 or float16: what the experts made.
    row_map
        int32 [T, K], contiguous, from `permute`. Entries outside [0, R) are left out;
        a row belongs to one choice at most.
    weights
        [T, K], contiguous, float32 or the rows' dtype; None: all one.
    num_tokens
        T, where one wants it checked.

    Returns
    -------
    torch.Tensor
        [T, H] of the rows' dtype. Products and sums are float32, in the order of k:
        the same bits on every run.

    Raises
    ------
    ValueError, TypeError
        Naming the argument, what was wanted and what came.

    Notes
    -----
    Differentiable once, in backward mode, in rows and weights.

    Examples
    --------
    >>> import torch
    >>> from moetuner.ops import unpermute
    >>> rows = torch.tensor([[1.0], [10.0], [100.0]])
    >>> row_map = torch.tensor([[2, 0], [1, -1]], dtype=torch.int32)
    >>> unpermute(rows, row_map, torch.tensor([[0.5, 2.0], [1.0, 9.0]])).tolist()
    [[52.0], [10.0]]
    """
    return torch.ops.moetuner.unpermute.default(rows, row_map, weights, num_tokens)  # type: ignore[no-any-return,unused-ignore]


@torch.library.register_fake("moetuner::unpermute")  # type: ignore[untyped-decorator,unused-ignore]
def _fake(
    rows: torch.Tensor,
    row_map: torch.Tensor,
    weights: torch.Tensor | None = None,
    num_tokens: int | None = None,
) -> torch.Tensor:
    same_device("unpermute", rows, row_map=row_map, weights=weights)
    return rows.new_empty(row_map.shape[0], rows.shape[1])


@torch.library.register_fake("moetuner::unpermute_backward")  # type: ignore[untyped-decorator,unused-ignore]
def _fake_backward(
    grad_out: torch.Tensor,
    row_map: torch.Tensor,
    num_rows: int,
    weights: torch.Tensor | None = None,
    rows: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    others = {"row_map": row_map, "weights": weights, "rows": rows}
    same_device("unpermute_backward", grad_out, **others)
    grad_rows = grad_out.new_empty(num_rows, grad_out.shape[1])
    if rows is None or weights is None:
        return grad_rows, grad_out.new_empty(0)
    return grad_rows, torch.empty_like(weights)
