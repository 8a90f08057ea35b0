"""Routing that is given to a Transformers model instead of chosen by its routers."""

from __future__ import annotations

from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from moetuner.errors import InvalidTraceError
from moetuner.integrations.transformers.families import GETS_NO_IDS, experts_of

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    import torch

    from moetuner.nn import GivenRouting


@contextmanager
def replay_routing(
    model: torch.nn.Module, routing: Mapping[int, GivenRouting]
) -> Iterator[None]:
    """Let experts run on ids and weights that are given, while the context lasts.

    Parameters
    ----------
    model
        A Transformers model with experts that our ops can run, whatever runs them;
        spread over ranks or not.
    routing
        By the model's layer numbers, with weights: routers of Transformers cannot
        weight experts that others chose. Rows are those of a call, padding included.

    Raises
    ------
    InvalidTraceError
        When the model has no such layer, weights are left out, or its experts are not
        called with ids (llama4); in the forward pass, for another number of tokens.
    """
    layers = experts_of(model)
    unknown = sorted(routing.keys() - layers.keys())
    if unknown:
        raise InvalidTraceError(
            f"replay_routing: the model has MoE layers {sorted(layers)}, got routing "
            f"for {unknown}"
        )
    deaf = sorted(n for n in routing if type(layers[n]).__name__ in GETS_NO_IDS)
    if deaf:
        raise InvalidTraceError(
            f"replay_routing: the experts of layers {deaf} are "
            f"{type(layers[deaf[0]]).__name__}, which are not called with ids and "
            f"weights: there is no place to give them"
        )
    bare = sorted(n for n, given in routing.items() if given.topk_weights is None)
    if bare:
        raise InvalidTraceError(
            f"replay_routing: layers {bare} have no topk_weights: give those of the "
            f"run that is replayed"
        )

    def instead(layer: int, given: GivenRouting) -> Any:
        def hook(_: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            names = ("hidden_states", "top_k_index", "top_k_weights")
            called = dict(zip(names, args, strict=False)) | kwargs
            if len(given.topk_ids) != len(called["top_k_index"]):
                raise InvalidTraceError(
                    f"replay_routing: layer {layer} was given routing for "
                    f"{len(given.topk_ids)} tokens, the call has "
                    f"{len(called['top_k_index'])}"
                )
            return (called["hidden_states"], given.topk_ids, given.topk_weights), {}

        return hook

    handles = [
        layers[layer].register_forward_pre_hook(
            instead(layer, given), with_kwargs=True, prepend=True
        )
        for layer, given in routing.items()
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
