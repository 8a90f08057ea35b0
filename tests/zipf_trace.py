"""Made-up routing whose skew and layer-to-layer affinity are known.

Legend: T tokens, L layers, E experts, K top-k.
"""

import numpy as np
from moetuner.trace import Trace


def zipf_trace(
    *,
    num_tokens,
    num_layers,
    num_experts,
    top_k,
    num_sequences=1,
    skew=0.0,
    affinity=0.0,
    seed=0,
):
    """Loads fall by Zipf's law, and tokens may follow the partners of their experts.

    In every layer the experts have an order of popularity of their own; the r-th is
    drawn with weight ``r ** -skew``. An expert's partner in the next layer is the one
    of the same popularity, so affinity, the probability that a token goes to the
    partners of all its experts, changes no expected load.
    """
    rng = np.random.default_rng(seed)
    expert_of_LE = [rng.permutation(num_experts) for _ in range(num_layers)]
    topk_ids = np.empty((num_tokens, num_layers, top_k), np.int16)
    popularity_TK = _draw(rng, num_tokens, num_experts, top_k, skew)
    for layer, expert_of in enumerate(expert_of_LE):
        if layer:
            anew = rng.random(num_tokens) >= affinity
            count = int(anew.sum())
            popularity_TK[anew] = _draw(rng, count, num_experts, top_k, skew)
        topk_ids[:, layer] = expert_of[popularity_TK]
    sequence = np.arange(num_tokens, dtype=np.int64) * num_sequences // num_tokens
    starts = np.searchsorted(sequence, sequence)
    return Trace(
        topk_ids=topk_ids,
        num_experts=num_experts,
        layer_ids=np.arange(num_layers, dtype=np.int32),
        sequence=sequence.astype(np.int32),
        position=(np.arange(num_tokens) - starts).astype(np.int32),
        ranked=True,
    )


def _draw(rng, num_rows, num_experts, top_k, skew):
    """[rows, K] distinct places in the order of popularity, the first drawn first."""
    liking = -skew * np.log(np.arange(1, num_experts + 1))
    # The largest of log-weight + Gumbel noise are a weighted draw without replacement.
    noise = rng.gumbel(size=(num_rows, num_experts))
    return np.argsort(-(liking + noise), axis=1)[:, :top_k]
