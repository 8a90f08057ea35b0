"""Experts that lie otherwise than Transformers' interface has them, laid out like that.

State dicts keep the names of the family: see `_split` and `_rename`. Legend: E experts,
S slots of this rank, H hidden, I inner.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from moetuner.nn.exchange import ATTRIBUTE, Exchange

INTERFACE = {
    "has_gate": True,
    "has_bias": False,
    "has_post_expert_norm": False,
    "is_transposed": False,
    "is_concatenated": True,
}
"""Flags of Transformers' interface for experts, as most families have them."""

LISTS = {"SwitchTransformersExperts": {"up_proj": "wi", "down_proj": "wo"}}
"""Kinds that are a dictionary of MLPs: the linear maps of each, by our names."""

BLOCKS = {
    "JetMoeMoE": {"gate_up_proj": "input_linear", "down_proj": "output_linear"},
}
"""Kinds of blocks that have 3-D weights in modules of their own, by our names."""


def stacked(module: Any) -> Any:
    """The module's experts with one 3-D weight a map; itself where it has that.

    Parameters are new ones for a list, and the same ones for a block.

    Raises
    ------
    InvalidPlacementError
        When maps of a list are no plain linear ones, as under adapters.
    """
    kind = type(module).__name__
    if kind in LISTS:
        return _of_list(module, LISTS[kind])
    if kind in BLOCKS:
        return _of_block(module, BLOCKS[kind])
    return module


def check_stackable(module: Any, layer: int) -> str:
    """Why a list of experts cannot be stacked; empty when it can."""
    parts = LISTS.get(type(module).__name__, {})
    for name, mlp in module.named_children() if parts else ():
        for part in parts.values():
            linear = getattr(mlp, part)
            if type(linear) is not torch.nn.Linear or linear.bias is not None:
                return (
                    f"{name}.{part} of the experts of layer {layer} is "
                    f"{type(linear).__name__}, wanted a Linear without bias: merge "
                    f"adapters into the weights first"
                )
    return ""


@torch.no_grad()
def _of_list(module: Any, parts: dict[str, str]) -> Any:
    experts = [module[f"expert_{e}"] for e in range(module.num_experts)]
    first = experts[0]
    for expert in range(module.num_experts):
        del module._modules[f"expert_{expert}"]
    for name, part in parts.items():
        weights = [getattr(mlp, part).weight for mlp in experts]
        learns = any(weight.requires_grad for weight in weights)
        whole = torch.nn.Parameter(torch.stack(weights), requires_grad=learns)
        module.register_parameter(name, whole)
    module.add_module("act_fn", torch.nn.Sequential(first.act, first.dropout))
    vars(module).update(INTERFACE | {"has_gate": False})
    module.register_state_dict_post_hook(_split)
    module.register_load_state_dict_pre_hook(_join)
    return module


class StackedExperts(torch.nn.Module):
    """Experts of a block, as Transformers' interface has them."""

    def __init__(self, num_experts: int, weights: dict[str, Any], act_fn: Any) -> None:
        super().__init__()
        self.num_experts = num_experts
        for name, weight in weights.items():
            self.register_parameter(name, weight)
        self.act_fn = act_fn
        vars(self).update(INTERFACE)


def _of_block(block: Any, parts: dict[str, str]) -> StackedExperts:
    weights = {name: block._modules[part].weight for name, part in parts.items()}
    number = block._modules[next(iter(parts.values()))].num_experts
    for part in parts.values():
        del block._modules[part]
    block.experts = StackedExperts(number, weights, block.activation)
    block.register_state_dict_post_hook(_rename)
    block.register_load_state_dict_pre_hook(_rename_back)
    return block.experts  # type: ignore[no-any-return]


def _is_whole(module: Any, rows: int) -> bool:
    """Whether row e is expert e, of all E: else rows are slots of this rank."""
    exchange = vars(module).get(ATTRIBUTE)
    if not isinstance(exchange, Exchange):
        return True
    slots = exchange.placement.slot_experts[exchange.tables.row_of(exchange.layer)]
    in_order = slots[slots >= 0]
    every = np.arange(exchange.placement.num_experts)
    return rows == len(every) and np.array_equal(in_order, every)


def _split(module: Any, state: dict[str, Any], prefix: str, _: Any) -> None:
    """A whole list is saved as it was, a weight for each expert."""
    for name, part in LISTS[type(module).__name__].items():
        if _is_whole(module, len(state[f"{prefix}{name}"])):
            for expert, row in enumerate(state.pop(f"{prefix}{name}")):
                state[f"{prefix}expert_{expert}.{part}.weight"] = row


def _join(module: Any, state: dict[str, Any], prefix: str, *_: Any) -> None:
    for name, part in LISTS[type(module).__name__].items():
        names = [f"{prefix}expert_{e}.{part}.weight" for e in range(module.num_experts)]
        if all(each in state for each in names):
            rows = [state.pop(each) for each in names]
            state[f"{prefix}{name}"] = torch.stack(rows)


def _rename(block: Any, state: dict[str, Any], prefix: str, _: Any) -> None:
    for name, part in BLOCKS[type(block).__name__].items():
        state[f"{prefix}{part}.weight"] = state.pop(f"{prefix}experts.{name}")


def _rename_back(block: Any, state: dict[str, Any], prefix: str, *_: Any) -> None:
    for name, part in BLOCKS[type(block).__name__].items():
        if f"{prefix}{part}.weight" in state:
            state[f"{prefix}experts.{name}"] = state.pop(f"{prefix}{part}.weight")
