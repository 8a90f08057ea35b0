"""What all ways to run a Transformers model's experts share.

Legend: M rows in expert order, E experts (or slots) here, H hidden.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any

from moetuner.errors import InvalidTraceError
from moetuner.nn.experts import grouped_linear

if TYPE_CHECKING:
    import torch


def run_experts(
    module: Any, rows: torch.Tensor, end_offsets: torch.Tensor
) -> torch.Tensor:
    """Rows [M, H] by expert, to rows [M, H], with the module's weights as they lie."""

    def linear(x: torch.Tensor, name: str) -> torch.Tensor:
        bias = getattr(module, f"{name}_bias") if module.has_bias else None
        weight = getattr(module, name)
        return grouped_linear(
            x, weight, end_offsets, bias, is_transposed=module.is_transposed
        )

    if module.has_gate:
        inner = module._apply_gate(linear(rows, "gate_up_proj"))
    else:
        inner = module.act_fn(linear(rows, "up_proj"))
    done = linear(inner, "down_proj")
    if getattr(module, "has_post_expert_norm", False):
        done = module.post_expert_norm(done)
    return done


def experts_of(model: torch.nn.Module) -> dict[int, torch.nn.Module]:
    """Experts module of each layer, by the last number in its name.

    Raises
    ------
    InvalidTraceError
        When there is none that is understood, or two of one layer.
    """
    found: dict[int, torch.nn.Module] = {}
    for name, module in model.named_modules():
        numbers = re.findall(r"\.(\d+)\.", name)
        if hasattr(module, "is_concatenated") and hasattr(module, "num_experts"):
            layer = int(numbers[-1]) if numbers else 0
            if layer in found:
                raise InvalidTraceError(
                    f"record: {name} is a second experts module of layer {layer}"
                )
            found[layer] = module
    if not found:
        raise InvalidTraceError(
            f"record: {type(model).__name__} has no experts module that Transformers "
            f"can run by an experts_implementation"
        )
    return found
