"""Tokens for a recording that only counted, so that its loads can be replayed.

Legend: Q groups (questions, say), L layers, E experts, K top-k, n tokens of a group.
"""

from __future__ import annotations

import numpy as np
from moetuner.trace import CountTrace, Trace


def draw_tokens(counts: CountTrace, num_tokens: int, seed: int) -> Trace:
    """A trace with the real loads of whole groups, `num_tokens` of them or just more.

    Real are the loads: each group's choices of each layer and expert are exactly those
    that were recorded. Which token chose what, which experts one token chose together
    and from layer to layer, and their order, nobody recorded: they are drawn at random,
    K distinct experts per token. So the result says what balance is worth, and nothing
    of affinity. Groups come whole, one after another, in an order that is drawn too:
    neighbours in such a file are of one subject.
    """
    rng = np.random.default_rng(seed)
    ids: list[np.ndarray] = []
    chosen: list[int] = []
    for group in rng.permutation(counts.num_groups):
        if sum(map(len, ids)) >= num_tokens:
            break
        layers = [
            _draw_layer(loads, counts.top_k, rng) for loads in counts.counts[group]
        ]
        ids.append(np.stack(layers, axis=1))
        chosen.append(group)
    return Trace(
        topk_ids=np.concatenate(ids),
        num_experts=counts.num_experts,
        layer_ids=counts.layer_ids,
        sequence=np.repeat(chosen, list(map(len, ids))).astype(np.int32),
        metadata=counts.metadata,
    )


def _draw_layer(loads: np.ndarray, top_k: int, rng: np.random.Generator) -> np.ndarray:
    """int16 [n, K], each expert as often as `loads` [E] says.

    Choices lie expert after expert; token t takes those at t, t + n, ... No expert has
    more than n, so a token meets none twice.
    """
    num_tokens, rest = divmod(int(loads.sum()), top_k)
    assert not rest, loads
    assert loads.max(initial=0) <= num_tokens, loads
    order = rng.permutation(len(loads))
    ids = np.repeat(order, loads[order]).reshape(top_k, num_tokens).T
    ids = rng.permuted(rng.permutation(ids), axis=1)
    return np.ascontiguousarray(ids, np.int16)
