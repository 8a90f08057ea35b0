"""Routing that is given instead of chosen, as reinforcement learning replays it.

Legend: T tokens, K top-k.
"""

from __future__ import annotations

from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

from moetuner.errors import InvalidTraceError
from moetuner.nn.layer import MoELayer

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    import torch


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class GivenRouting:
    """What one layer shall do with its tokens.

    Parameters
    ----------
    topk_ids
        int32 or int64 [T, K]; ids outside [0, E) are padding, beyond int32 refused.
    topk_weights
        [T, K]; None: the router's own for those ids, with their gradients.

    Raises
    ------
    InvalidTraceError
        When ids and weights have other shapes.
    """

    topk_ids: torch.Tensor
    topk_weights: torch.Tensor | None = None

    def __post_init__(self) -> None:
        ids, weights = self.topk_ids, self.topk_weights
        if ids.dim() != 2 or (weights is not None and weights.shape != ids.shape):
            told = None if weights is None else list(weights.shape)
            raise InvalidTraceError(
                f"GivenRouting: wanted ids [tokens, top_k] and weights of that shape, "
                f"got {list(ids.shape)} and {told}"
            )


@contextmanager
def replay_routing(
    model: torch.nn.Module, routing: Mapping[int, GivenRouting]
) -> Iterator[None]:
    """Let layers take the experts that they are given, while the context lasts.

    Parameters
    ----------
    model
        With `MoELayer` modules. For Transformers:
        `moetuner.integrations.transformers.replay_routing`.
    routing
        By layer; layers that are not named choose by themselves. One forward pass takes
        it; activation checkpointing needs it again, so let ``backward`` stand inside.

    Raises
    ------
    InvalidTraceError
        When the model has no such layer; in the forward pass, for another number of
        tokens, or when weights are left out and the router takes no ``topk_ids``.
    """
    layers = {
        module.exchange.layer: module
        for module in model.modules()
        if isinstance(module, MoELayer)
    }
    unknown = sorted(routing.keys() - layers.keys())
    if unknown:
        raise InvalidTraceError(
            f"replay_routing: the model has MoE layers {sorted(layers)}, got routing "
            f"for {unknown}"
        )
    for layer, given in routing.items():
        layers[layer].given = given
    try:
        yield
    finally:
        for layer in routing:
            layers[layer].given = None
