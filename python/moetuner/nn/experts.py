"""What experts compute on rows in expert order.

Legend: R rows, E experts, I inputs, O outputs; of `Experts`: S slots, M rows, H hidden
size, I inner size.
"""

from __future__ import annotations

import enum
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from moetuner.nn.grouped_mm import grouped_mm
from moetuner.nn.tail import per_expert

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray


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
        [R, O] of the weight's dtype. Rows behind the last expert's are undefined, so
        are their gradients, and no gradient is made of them: see
        `moetuner.nn.per_expert` and `moetuner.nn.defined_rows` for values of your own.

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
    out = grouped_mm(rows.to(matrix.dtype), matrix, end_offsets)
    if bias is None:
        return out
    return out + per_expert(bias, rows.shape[0], end_offsets)  # it may be unknown


class Activation(enum.Enum):
    """What stands between the two linear maps of an expert."""

    SWIGLU = "swiglu"
    """``silu(gate) * up``; the first map makes both, gate first."""
    GELU = "gelu"


@dataclass(frozen=True, kw_only=True, slots=True)
class ExpertOptions:
    """What the experts of a layer are like."""

    activation: Activation = Activation.SWIGLU
    bias: bool = False


class Experts(torch.nn.Module):
    """Experts as 3-D weights, one row per slot: up, activation, down.

    Parameters
    ----------
    num_slots
        S, experts that live here.
    hidden_size, inner_size
        Widths H of the model and I of one expert.
    options
        Activation, biases.
    device, dtype
        Of the weights.

    Notes
    -----
    ``up`` is [S, 2 I, H] with SWIGLU, [S, I, H] else; ``down`` is [S, H, I]; biases
    ``up_bias`` and ``down_bias`` are their first two axes. `grouped_mm` wants
    H and I in multiples of 16 bytes on every device: 8 values in bfloat16 and float16,
    4 in float32.
    """

    up: torch.nn.Parameter
    down: torch.nn.Parameter
    up_bias: torch.nn.Parameter | None
    down_bias: torch.nn.Parameter | None

    def __init__(
        self,
        num_slots: int,
        hidden_size: int,
        inner_size: int,
        options: ExpertOptions | None = None,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.options = options or ExpertOptions()
        width = inner_size * (2 if self.options.activation is Activation.SWIGLU else 1)
        shapes = {
            "up": (num_slots, width, hidden_size),
            "down": (num_slots, hidden_size, inner_size),
        }
        for name, shape in shapes.items():
            weight = torch.empty(shape, device=device, dtype=dtype)
            torch.nn.init.uniform_(weight, -(shape[2] ** -0.5), shape[2] ** -0.5)
            self.register_parameter(name, torch.nn.Parameter(weight))
            bias = None
            if self.options.bias:
                bias = torch.nn.Parameter(weight.new_zeros(shape[:2]))
            self.register_parameter(f"{name}_bias", bias)

    def forward(self, rows: torch.Tensor, end_offsets: torch.Tensor) -> torch.Tensor:
        """Run each slot's expert on its rows [M, H]; see `grouped_linear`."""
        inner = grouped_linear(rows, self.up, end_offsets, self.up_bias)
        if self.options.activation is Activation.SWIGLU:
            gate, up = inner.chunk(2, dim=-1)
            inner = torch.nn.functional.silu(gate) * up
        else:
            inner = torch.nn.functional.gelu(inner)
        return grouped_linear(inner, self.down, end_offsets, self.down_bias)

    def take(self, slot_experts: NDArray[np.int32]) -> Experts:
        """Weights of the experts of those ids, int32 [S]; zeros where it is -1."""
        _, hidden_size, inner_size = self.down.shape
        taken = Experts(
            len(slot_experts),
            hidden_size,
            inner_size,
            self.options,
            device=self.down.device,
            dtype=self.down.dtype,
        )
        index = torch.tensor(slot_experts, dtype=torch.int64, device=taken.down.device)
        with torch.no_grad():
            for own, other in zip(taken.parameters(), self.parameters(), strict=True):
                own.copy_(other[index.clamp(min=0)])
                own[index < 0] = 0
        return taken
