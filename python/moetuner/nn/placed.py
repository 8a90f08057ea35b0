"""Where the experts of a model are, whoever wrote it."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

from moetuner.nn.exchange import ATTRIBUTE, Exchange

if TYPE_CHECKING:
    from collections.abc import Iterator

    import torch


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
