"""Made-up routing whose skew and affinity are known, for examples and tests.

Nothing here imitates a model; measure real ones with real traces.

Legend: T tokens, L layers, E experts, K top-k.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import numpy as np

from moetuner.errors import InvalidTraceError
from moetuner.trace.model import MAX_EXPERTS, Trace, TraceMetadata

if TYPE_CHECKING:
    from numpy.typing import NDArray


def synthetic_trace(
    *,
    num_tokens: int,
    num_layers: int,
    num_experts: int,
    top_k: int,
    num_sequences: int = 1,
    skew: float = 0.0,
    affinity: float = 0.0,
    seed: int = 0,
) -> Trace:
    """Routing with Zipf-like loads and a chosen layer-to-layer affinity.

    In every layer the experts have an order of popularity of their own. An expert's
    partner in the next layer is the one of the same popularity, so affinity changes
    no expected load, and skew no affinity.

    Parameters
    ----------
    num_tokens, num_layers, num_experts, top_k
        Shape of the trace; `top_k` is at most `num_experts`.
    num_sequences
        Contiguous sequences of equal length, give or take one token.
    skew
        Exponent of Zipf's law: the r-th most popular expert of a layer is drawn with
        weight ``r ** -skew``. 0 draws all alike.
    affinity
        Probability that a token's experts at the next layer are the partners of those
        that it has at this one; otherwise they are drawn anew.
    seed
        The same arguments give the same trace, and the same seed and number of experts
        the same partners.

    Returns
    -------
    Trace
        With ``sequence`` and ``position``; ``ranked``, each row in the order drawn.

    Raises
    ------
    InvalidTraceError
        Naming the argument that makes no sense.
    """
    _check(num_tokens, num_layers, num_experts, top_k, num_sequences, skew, affinity)
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
        metadata=TraceMetadata(
            model="synthetic",
            source="moetuner.trace.synthetic_trace",
            dataset=f"skew {skew:g}, affinity {affinity:g}, seed {seed}",
        ),
    )


def _draw(
    rng: np.random.Generator, num_rows: int, num_experts: int, top_k: int, skew: float
) -> NDArray[np.intp]:
    """[rows, K] distinct places in the order of popularity, the first drawn first."""
    liking = -skew * np.log(np.arange(1, num_experts + 1))
    # The largest of log-weight + Gumbel noise are a weighted draw without replacement.
    noise = rng.gumbel(size=(num_rows, num_experts))
    return np.argsort(-(liking + noise), axis=1)[:, :top_k]


def _check(
    num_tokens: int,
    num_layers: int,
    num_experts: int,
    top_k: int,
    num_sequences: int,
    skew: float,
    affinity: float,
) -> None:
    wanted = {
        f"num_tokens >= 1, got {num_tokens}": num_tokens >= 1,
        f"num_layers >= 1, got {num_layers}": num_layers >= 1,
        f"num_experts in 1..{MAX_EXPERTS}, got {num_experts}": (
            1 <= num_experts <= MAX_EXPERTS
        ),
        f"top_k in 1..{num_experts} (num_experts), got {top_k}": (
            1 <= top_k <= num_experts
        ),
        f"num_sequences in 1..{num_tokens} (num_tokens), got {num_sequences}": (
            1 <= num_sequences <= num_tokens
        ),
        f"skew finite and >= 0, got {skew}": 0 <= skew < math.inf,
        f"affinity in [0, 1], got {affinity}": 0 <= affinity <= 1,
    }
    for wish, holds in wanted.items():
        if not holds:
            raise InvalidTraceError(f"synthetic_trace: wanted {wish}")
