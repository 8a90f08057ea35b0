"""Made-up routing that looks like a model's: skew, affinity and busy batches together.

Every token has a direction u in d dimensions, part its topic's, part its own, which
drifts slowly from layer to layer; every expert has a direction v and a bias::

    logit = specificity * u.v / |v| + spread * bias + Gumbel noise, the top k win

Experts with similar v are chosen together (co-activation), a token that keeps its u
keeps its experts' company in the next layer (transitions), biases make some experts
busier than others (skew), and sequences about few topics make batches differ. The
presets are fitted to recordings of real models; ``benchmarks/planning/calibration.py``
prints how close they come.

Legend: T tokens, L layers, E experts, K top-k, d dimensions.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np

from moetuner.errors import InvalidTraceError
from moetuner.trace.model import MAX_EXPERTS, Trace, TraceMetadata

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Singles = NDArray[np.float32]

_CHUNK_CELLS = 1 << 20  # (token, expert) logits that are held at a time
_MAX_LOGIT = np.float32(80)  # exp() of more is no float32


@dataclass(frozen=True, kw_only=True, slots=True)
class TopicRouting:
    """Shape and character of made-up routing.

    Parameters
    ----------
    num_layers, num_experts, top_k
        Of the model.
    model
        Name whose sizes `moetuner.shape_for_model` knows, or any other.
    specificity
        How much a token's direction matters, in units of the noise.
    spread
        How much experts differ in popularity whatever the token, in the same units.
    dimensions
        Of the directions; fewer make more pairs of experts alike.
    drift
        Share of a direction that is new at every layer, in [0, 1].
    topics
        Number of topics; a sequence is about one of them for ``focus`` of its tokens,
        the others are drawn from all.
    topic_share
        Share of a token's direction (its variance) that is its topic's, in [0, 1].
    focus
        In [0, 1].
    sequence_length
        Tokens of a sequence.
    """

    num_layers: int
    num_experts: int
    top_k: int
    model: str = "synthetic"
    specificity: float = 1.8
    spread: float = 0.5
    dimensions: int = 12
    drift: float = 0.15
    topics: int = 64
    topic_share: float = 0.5
    focus: float = 0.5
    sequence_length: int = 256

    def __post_init__(self) -> None:
        wanted = {
            "num_layers": self.num_layers >= 1,
            "num_experts": 1 <= self.num_experts <= MAX_EXPERTS,
            "top_k": 1 <= self.top_k <= self.num_experts,
            "specificity": 0 <= self.specificity < np.inf,
            "spread": 0 <= self.spread < np.inf,
            "dimensions": self.dimensions >= 1,
            "drift": 0 <= self.drift <= 1,
            "topics": self.topics >= 1,
            "topic_share": 0 <= self.topic_share <= 1,
            "focus": 0 <= self.focus <= 1,
            "sequence_length": self.sequence_length >= 1,
        }
        for name, holds in wanted.items():
            if not holds:
                raise InvalidTraceError(
                    f"TopicRouting: {name} makes no sense: {getattr(self, name)!r}"
                )


_CHAT = TopicRouting(  # fitted to DeepSeek-V2-Lite-Chat on chat prompts
    model="deepseek-v2-lite",
    num_layers=26,
    num_experts=64,
    top_k=6,
    specificity=5.6,
    spread=1.04,
    dimensions=11,
    drift=0.08,
    topic_share=0.15,
    topics=128,
    focus=0.2,
    sequence_length=94,
)
_ANSWERS = TopicRouting(  # fitted to gpt-oss-20b answering MMLU questions
    model="gpt-oss",
    num_layers=24,
    num_experts=32,
    top_k=4,
    specificity=3.7,
    spread=0.0,
    dimensions=25,
    drift=0.16,
    topic_share=0.98,
    topics=64,
    focus=0.92,
    sequence_length=299,
)


def _sized(
    model: str, num_layers: int, num_experts: int, top_k: int, **changes: float
) -> TopicRouting:
    """Another model with the character of `_CHAT`."""
    sizes = {"num_layers": num_layers, "num_experts": num_experts, "top_k": top_k}
    return replace(_CHAT, model=model, **sizes, **changes)  # type: ignore[arg-type]


TOPIC_PRESETS: dict[str, TopicRouting] = {
    # Only loads of Mixtral are recorded: they are much less skewed.
    "mixtral": _sized("mixtral-8x7b", 32, 8, 2, specificity=2.0, spread=0.3),
    "gpt-oss": _ANSWERS,
    "deepseek-v2-lite": _CHAT,
    "qwen3": _sized("qwen3-30b-a3b", 48, 128, 8),
    "deepseek-v3": _sized("deepseek-v3", 58, 256, 8),
    "96x512": _sized("deepseek-v3", 96, 512, 8),
}
"""Calibrated routing by name. No per-token recording of 128 or more experts was there
to fit: those have the character of DeepSeek-V2-Lite, in their own sizes."""


def topic_trace(routing: TopicRouting, *, num_tokens: int, seed: int = 0) -> Trace:
    """Draw tokens; memory beyond the trace itself does not grow with E x T.

    Parameters
    ----------
    routing
        What is drawn.
    num_tokens
        Tokens T, in sequences.
    seed
        The same arguments give the same trace.

    Returns
    -------
    Trace
        With ``sequence`` and ``position``; ``ranked``, the strongest expert first.

    Raises
    ------
    InvalidTraceError
        When there are no tokens to draw.
    """
    if num_tokens < 1:
        raise InvalidTraceError(f"topic_trace: num_tokens must be >= 1: {num_tokens}")
    rng = np.random.default_rng(seed)
    sequence = np.arange(num_tokens, dtype=np.int32) // routing.sequence_length
    topic = _topics(rng, sequence, routing)
    dims = routing.dimensions
    centres = _normal(rng, routing.topics, dims)
    own = _normal(rng, num_tokens, dims)
    topk_ids = np.empty((num_tokens, routing.num_layers, routing.top_k), np.int16)
    share, drift = np.float32(routing.topic_share), np.float32(routing.drift)
    for layer in range(routing.num_layers):
        if layer:
            for part in (centres, own):
                part *= np.sqrt(1 - drift)
                part += np.sqrt(drift) * _normal(rng, *part.shape)
        experts = _normal(rng, routing.num_experts, dims)
        length = np.linalg.norm(experts, axis=1, keepdims=True)
        experts *= np.float32(routing.specificity) / np.maximum(length, 1e-6)
        bias = np.float32(routing.spread) * _normal(rng, routing.num_experts)
        _draw(rng, topk_ids[:, layer], centres, own, topic, share, experts, bias)
    return Trace(
        topk_ids=topk_ids,
        num_experts=routing.num_experts,
        layer_ids=np.arange(routing.num_layers, dtype=np.int32),
        sequence=sequence,
        position=np.arange(num_tokens, dtype=np.int32) % routing.sequence_length,
        ranked=True,
        metadata=TraceMetadata(
            model=routing.model,
            source="moetuner.trace.topic_trace",
            dataset=f"{routing}, seed {seed}",
        ),
    )


def _normal(rng: np.random.Generator, *shape: int) -> Singles:
    return rng.standard_normal(shape, dtype=np.float32)


def _topics(
    rng: np.random.Generator, sequence: NDArray[np.int32], routing: TopicRouting
) -> NDArray[np.int64]:
    """Topic of each token, [T]."""
    main = rng.integers(0, routing.topics, int(sequence[-1]) + 1)
    any_topic = rng.integers(0, routing.topics, sequence.size)
    stays = rng.random(sequence.size) < routing.focus
    return np.where(stays, main[sequence], any_topic)


def _draw(
    rng: np.random.Generator,
    out: NDArray[np.int16],
    centres: Singles,
    own: Singles,
    topic: NDArray[np.int64],
    share: np.float32,
    experts: Singles,
    bias: Singles,
) -> None:
    """Fill `out` [T, K] with the winners of one layer, strongest first."""
    top_k = out.shape[1]
    step = max(_CHUNK_CELLS // len(experts), 1)
    for begin in range(0, len(out), step):
        rows = slice(begin, begin + step)
        direction = np.sqrt(share) * centres[topic[rows]]
        direction += np.sqrt(1 - share) * own[rows]
        logit = direction @ experts.T + bias
        # argmax of logit + Gumbel = argmin of exponential / exp(logit), and faster.
        logit -= logit.max(axis=1, keepdims=True)
        key = rng.standard_exponential(logit.shape, dtype=np.float32)
        key *= np.exp(np.minimum(-logit, _MAX_LOGIT), out=logit)
        if top_k < len(experts):
            best = np.argpartition(key, top_k - 1, axis=1)[:, :top_k]
        else:
            best = np.tile(np.arange(top_k), (len(key), 1))
        order = np.argsort(np.take_along_axis(key, best, axis=1), axis=1)
        out[rows] = np.take_along_axis(best, order, axis=1)
