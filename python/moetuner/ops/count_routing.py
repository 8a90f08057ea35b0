"""Routing counts while the model runs: one kernel, no host synchronisation.

Legend: T tokens, K top-k, E experts.
"""

from __future__ import annotations

import torch

from moetuner.ops._devices import same_device
from moetuner.ops._ranges import ranged


@ranged
def count_routing(
    topk_ids: torch.Tensor,
    load: torch.Tensor,
    coactivation: torch.Tensor | None = None,
    previous_topk_ids: torch.Tensor | None = None,
    transitions: torch.Tensor | None = None,
) -> None:
    """Add the routing of one layer to persistent counters, in place.

    Parameters
    ----------
    topk_ids
        int32 or int64 [T, K], contiguous. Ids outside [0, E) are padding; beyond int32
        they are refused, on CUDA by a device assertion.
    load
        int64 [E], plus one for each token that chose the expert.
    coactivation
        int64 [E, E] or None, plus one for each token that chose both; the diagonal
        is the load.
    previous_topk_ids, transitions
        Both or neither: ids of the same tokens at the layer before, [T, J] of the
        same dtype, and int64 [E, E], plus one for each token that chose row e there
        and column f here.

    Raises
    ------
    ValueError, TypeError
        Naming the argument, what was wanted and what came.

    Notes
    -----
    Counters are exact on CPU and CUDA and survive CUDA-graph replay. Keep one
    ``[L, E]`` (``[L, E, E]``) tensor for the whole model and pass ``load[layer]``.
    Activation checkpointing runs a layer's forward pass again, and counts it again,
    unless you ask `moetuner.nn.recomputing`.

    Examples
    --------
    >>> import torch
    >>> from moetuner.ops import count_routing
    >>> load = torch.zeros(4, dtype=torch.int64)
    >>> count_routing(torch.tensor([[0, 2], [2, 3], [2, -1]]), load)
    >>> load.tolist()
    [1, 0, 3, 1]
    """
    torch.ops.moetuner.count_routing(
        topk_ids, load, coactivation, previous_topk_ids, transitions
    )


@torch.library.register_fake("moetuner::count_routing")  # type: ignore[untyped-decorator,unused-ignore]
def _fake(
    topk_ids: torch.Tensor,
    load: torch.Tensor,
    coactivation: torch.Tensor | None = None,
    previous_topk_ids: torch.Tensor | None = None,
    transitions: torch.Tensor | None = None,
) -> None:
    counters = {"load": load, "coactivation": coactivation, "transitions": transitions}
    others = {"previous_topk_ids": previous_topk_ids, **counters}
    same_device("count_routing", topk_ids, **others)
