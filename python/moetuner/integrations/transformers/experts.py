"""The experts of a Transformers model, on our ops.

Legend: T tokens, K top-k, M rows in expert order, E experts (or slots) here, H hidden.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from moetuner.nn.experts import grouped_linear
from moetuner.nn.tail import defined_rows
from moetuner.ops import permute, unpermute

if TYPE_CHECKING:
    from collections.abc import Callable

    Shared = Callable[[torch.Tensor], torch.Tensor]


def experts_forward(
    experts: torch.nn.Module,
    hidden_states: torch.Tensor,
    top_k_index: torch.Tensor,
    top_k_weights: torch.Tensor,
) -> torch.Tensor:
    """Run the experts of one layer on this device, as Transformers calls it.

    Parameters
    ----------
    experts
        A module that ``use_experts_implementation`` decorated: its flags say how its
        weights lie, gated or not, with biases or not.
    hidden_states
        [T, H].
    top_k_index
        int64 [T, K]; ids from ``num_experts`` on live elsewhere and are left out.
    top_k_weights
        [T, K].

    Returns
    -------
    torch.Tensor
        [T, H] of the dtype of ``hidden_states``; summed in float32 in the order of k.
    """
    module: Any = experts
    rows, row_map, end_offsets, _ = permute(
        hidden_states.contiguous(), top_k_index.contiguous(), module.num_experts
    )
    done = run_experts(module, rows, end_offsets)
    weights = top_k_weights.contiguous()
    if weights.dtype not in (torch.float32, done.dtype):
        weights = weights.float()
    return unpermute(done.contiguous(), row_map, weights).to(hidden_states.dtype)


def run_experts(
    module: Any,
    rows: torch.Tensor,
    end_offsets: torch.Tensor,
    shared: Shared = lambda parameter: parameter,
) -> torch.Tensor:
    """Rows [M, H] by expert, to rows [M, H], with the module's weights as they lie.

    `shared` is applied to each parameter that all experts of the layer have in common:
    its gradient is made of the rows that are here, which may be a part of all.
    """

    def linear(x: torch.Tensor, name: str) -> torch.Tensor:
        bias = getattr(module, f"{name}_bias") if module.has_bias else None
        weight = getattr(module, name)
        return grouped_linear(
            x, weight, end_offsets, bias, is_transposed=module.is_transposed
        )

    inner = linear(rows, "gate_up_proj" if module.has_gate else "up_proj")
    done = linear(_activated(module, inner, end_offsets, shared), "down_proj")
    if getattr(module, "has_post_expert_norm", False):
        norm = module.post_expert_norm
        weights = {name: shared(value) for name, value in norm.named_parameters()}
        defined = defined_rows(done, end_offsets)
        done = torch.func.functional_call(norm, weights, (defined,))
    return done


def _activated(
    module: Any, inner: torch.Tensor, end_offsets: torch.Tensor, shared: Shared
) -> torch.Tensor:
    """What stands between the two maps.

    An activation may have parameters, as xIELU has. Their gradient is made of all rows,
    so undefined ones are cut off on both sides: as rows, and as gradients that come
    back from the second map.
    """
    act = getattr(module, "act_fn", None)
    own = act.named_parameters() if isinstance(act, torch.nn.Module) else ()
    weights = {name: shared(value) for name, value in own}
    between: Any = _WithActivation(module, act, weights) if weights else module
    if weights:
        inner = defined_rows(inner, end_offsets)
    if module.has_gate:
        gate = getattr(type(module), "_apply_gate", _plain_gate)
        done: torch.Tensor = gate(between, inner)
    else:
        done = between.act_fn(inner)
    return defined_rows(done, end_offsets) if weights else done


def _plain_gate(module: Any, inner: torch.Tensor) -> torch.Tensor:
    gate, up = inner.chunk(2, dim=-1)
    done: torch.Tensor = module.act_fn(gate) * up
    return done


class _WithActivation:
    """An experts module whose activation is called with other parameters."""

    def __init__(self, module: Any, act: Any, weights: Any) -> None:
        self._module, self._act, self._weights = module, act, weights

    def act_fn(self, *rows: torch.Tensor) -> torch.Tensor:
        return torch.func.functional_call(self._act, self._weights, rows)  # type: ignore[no-any-return]

    def __getattr__(self, name: str) -> Any:
        return getattr(self._module, name)
