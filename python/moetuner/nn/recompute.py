"""Activation checkpointing: a layer's second pass is not another one.

`torch.utils.checkpoint`, reentrant or not, runs a forward pass again while gradients
are computed. What counts or records leaves that one out.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch.utils.checkpoint import create_selective_checkpoint_contexts

if TYPE_CHECKING:
    from contextlib import AbstractContextManager


RECOMPUTED = -2
"""Ids of a compiled pass that was computed again: no router gives them."""


def recomputing() -> bool:
    """Whether this runs inside a backward pass, on whatever thread that is.

    Always False in code that `torch.compile` traces: see `first_pass`.
    """
    if torch.compiler.is_compiling():
        return False
    return torch._C._current_graph_task_id() != -1


def first_pass(value: torch.Tensor, otherwise: int = 0) -> torch.Tensor:
    """The value; full of `otherwise` where this pass is computed again.

    Compiled code runs in both passes where checkpointing surrounds it, so it is asked
    when it runs. What is exported has one pass.
    """
    # Up to torch 2.11 Dynamo says that it exports whenever it traces: the flag knows.
    if torch.compiler.is_exporting() and torch.compiler._is_exporting_flag:
        return value
    if torch.compiler.is_compiling():
        return torch.ops.moetuner.first_pass.default(value, otherwise)  # type: ignore[no-any-return,unused-ignore]
    return torch.full_like(value, otherwise) if recomputing() else value


@torch.library.custom_op("moetuner::first_pass", mutates_args=())
def _first_pass(value: torch.Tensor, otherwise: int) -> torch.Tensor:
    return torch.full_like(value, otherwise) if recomputing() else value.clone()


@_first_pass.register_fake
def _fake(value: torch.Tensor, otherwise: int) -> torch.Tensor:  # noqa: ARG001
    return torch.empty_like(value)


def keep_routing() -> tuple[AbstractContextManager[Any], AbstractContextManager[Any]]:
    """Keep what routers chose, where everything else is computed again.

    For ``torch.utils.checkpoint.checkpoint(..., use_reentrant=False,
    context_fn=keep_routing)``. Without it a router whose second pass differs in the
    last bit may choose other experts, and gradients go to those, or shapes differ.
    The results of ``topk``, ``sort`` and ``argmax`` are kept: 12 bytes per choice where
    a router ends with them.

    Examples
    --------
    >>> import torch
    >>> from moetuner.nn import TopKRouter, keep_routing
    >>> from torch.utils.checkpoint import checkpoint
    >>> router, x = TopKRouter(8, 4, top_k=2), torch.randn(3, 8)
    >>> ids, weights = checkpoint(
    ...     router, x, use_reentrant=False, context_fn=keep_routing
    ... )
    >>> weights.square().sum().backward()
    """
    aten = torch.ops.aten
    choosing = [
        aten.topk.default,
        aten.sort.default,
        aten.sort.stable,
        aten.argmax.default,
    ]
    pair: tuple[Any, Any] = create_selective_checkpoint_contexts(choosing)  # type: ignore[no-untyped-call,unused-ignore]
    return pair
