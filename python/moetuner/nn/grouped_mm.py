"""One matrix product for each expert, in every dtype, eager and compiled.

PyTorch traces its own `torch.nn.functional.grouped_mm` in bfloat16 alone. Other dtypes
are hidden from the compiler in an op of ours, which runs the same kernel. Legend: R
rows, E experts, I inputs, O outputs.
"""

from __future__ import annotations

from typing import Any

import torch


def grouped_mm(
    rows: torch.Tensor, matrix: torch.Tensor, end_offsets: torch.Tensor
) -> torch.Tensor:
    """[R, I] times [E, I, O] by int32 [E], to [R, O]; rows behind: undefined."""
    if torch.compiler.is_compiling() and matrix.dtype is not torch.bfloat16:
        return torch.ops.moetuner.grouped_mm.default(rows, matrix, end_offsets)  # type: ignore[no-any-return,unused-ignore]
    return torch.nn.functional.grouped_mm(rows, matrix, offs=end_offsets)


@torch.library.custom_op("moetuner::grouped_mm", mutates_args=())
def _opaque(
    left: torch.Tensor, right: torch.Tensor, end_offsets: torch.Tensor
) -> torch.Tensor:
    """Also [I, R] times [R, O], to [E, I, O]: the gradient of the matrices."""
    return torch.nn.functional.grouped_mm(left, right, offs=end_offsets)


@_opaque.register_fake
def _fake(
    left: torch.Tensor, right: torch.Tensor, end_offsets: torch.Tensor
) -> torch.Tensor:
    size = (left.shape[0], right.shape[-1])
    return left.new_empty(size if right.dim() == 3 else (len(end_offsets), *size))


def _keep(ctx: Any, inputs: tuple[torch.Tensor, ...], output: torch.Tensor) -> None:  # noqa: ARG001
    ctx.save_for_backward(*inputs)


def _backward(ctx: Any, grad: torch.Tensor) -> Any:
    rows, matrix, end_offsets = ctx.saved_tensors
    of_rows, of_matrix, _ = ctx.needs_input_grad
    run = torch.ops.moetuner.grouped_mm.default
    grad = grad.contiguous()
    return (
        run(grad, matrix.transpose(-2, -1), end_offsets) if of_rows else None,
        run(rows.transpose(0, 1), grad, end_offsets) if of_matrix else None,
        None,
    )


_opaque.register_autograd(_backward, setup_context=_keep)
