"""Where the experts of a model are, whoever wrote it."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

from moetuner.errors import InvalidProblemError
from moetuner.nn.exchange import ATTRIBUTE, Exchange

if TYPE_CHECKING:
    from collections.abc import Iterator

    import torch


UNUSED_ROWS = "moetuner_unused_rows"
"""Where a module keeps rows of its weights, by name, that are of no expert."""


class Placed(NamedTuple):
    """Experts of one layer, and how its tokens reach them."""

    experts: torch.nn.Module
    exchange: Exchange


def placed_experts(model: torch.nn.Module) -> Iterator[tuple[str, Placed]]:
    """Name and value of each layer's experts, in the order of the model's modules."""
    for name, module in model.named_modules():
        exchange = vars(module).get(ATTRIBUTE)
        if isinstance(exchange, Exchange):
            yield name, Placed(module, exchange)
        exchange, experts = (
            module._modules.get(part) for part in ("exchange", "experts")
        )
        if isinstance(exchange, Exchange) and experts is not None:
            yield f"{name}.experts".removeprefix("."), Placed(experts, exchange)


def layers_for(operation: str, model: torch.nn.Module, otherwise: str) -> list[Placed]:
    """Of a model that must have some; else an error, with what to do otherwise.

    Raises
    ------
    InvalidProblemError
        When the model has no placed experts.
    """
    layers = [placed for _, placed in placed_experts(model)]
    if not layers:
        raise InvalidProblemError(
            f"{operation}: {type(model).__name__} has no layer whose experts were "
            f"placed: {otherwise}"
        )
    return layers


def adapters(model: torch.nn.Module) -> Iterator[tuple[str, Placed]]:
    """Modules around placed experts that hold parameters for them, as LoRA does.

    They keep what they adapt as ``base_layer``, as peft names it.
    """
    placed = {id(one.experts): one for _, one in placed_experts(model)}
    for name, module in model.named_modules():
        base = module
        while base._modules.get("base_layer") is not None:
            base = base._modules["base_layer"]
        if base is not module and id(base) in placed:
            yield name, Placed(module, placed[id(base)].exchange)


def what_adapts(model: torch.nn.Module) -> str:
    """Why adapters keep experts from moving; empty where there are none."""
    for name, (_, exchange) in adapters(model):
        return (
            f"{name} adapts the experts of layer {exchange.layer}, and would not move "
            f"along: merge it into the weights first"
        )
    return ""
