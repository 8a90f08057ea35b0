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


def recomputing() -> bool:
    """Whether this runs inside a backward pass, on whatever thread that is.

    Always False in code that `torch.compile` traces: it recomputes by itself, and
    never what counts.
    """
    if torch.compiler.is_compiling():
        return False
    return torch._C._current_graph_task_id() != -1


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
