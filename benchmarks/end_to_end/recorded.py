"""Routing that is planned on, and other routing that is replayed.

Legend: T tokens, L layers, K top-k, Q batches, G ranks, B sequences of a rank, S tokens
of a prompt, D tokens that are decoded after it.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import beside  # noqa: F401
import numpy as np
from counted import draw_tokens
from harness import traces_folder
from moetuner import demo_trace, read_trace, split_by_sequence
from moetuner.trace import TOPIC_PRESETS, CountTrace, Trace, topic_trace

if TYPE_CHECKING:
    from pathlib import Path

    from families import Family
    from numpy.typing import NDArray

DRAWN_TOKENS = 32768  # of a family that nobody recorded; both parts together
DRAWN_TO_PLAN = 1 << 17
"""At least, where only loads were recorded: drawn by question, so that of few questions
a plan learns pairs of experts that chance made, and loses on others."""
SHIPPED = "the shipped recording"


@dataclass(frozen=True, kw_only=True)
class Source:
    """Two parts of one recording; they share no sequence where it knows them."""

    plan: Trace
    replay: Trace
    about: str
    """Where it comes from, and what of it is real."""


def read_source(
    family: Family, *, file: Path | None, layers: int, tokens: int, seed: int
) -> Source:
    """The recording of a family, its first layers, split by sequence.

    ``tokens`` are drawn for each part where only loads were recorded.
    """
    path = file or (traces_folder() / family.recording if family.recording else None)
    if path is not None:
        whole, about = read_trace(path), f"{path.parent.name}/{path.name}"
    elif family.drawn:
        preset = TOPIC_PRESETS[family.drawn]
        whole = topic_trace(preset, num_tokens=DRAWN_TOKENS, seed=seed)
        about = f"drawn: no recording is known, preset {family.drawn}"
    else:
        whole, about = demo_trace(), SHIPPED
    split = split_by_sequence(whole, 0.5, seed)
    if isinstance(split.plan, CountTrace):
        about += ", loads recorded, tokens drawn"
    if not split.held_out:
        about += ", nothing held out: it has one sequence"
    parts = [
        _tokens(split.plan, max(tokens, DRAWN_TO_PLAN), seed),
        _tokens(split.score, tokens, seed),
    ]
    for part in parts:
        if (part.num_experts, part.top_k) != (family.experts, family.top_k):
            raise SystemExit(
                f"{family.name} has {family.experts} experts and takes "
                f"{family.top_k}; {about} has {part.num_experts} and {part.top_k}"
            )
    plan, replay = (first_layers(part, layers) for part in parts)
    return Source(plan=plan, replay=replay, about=about)


def _tokens(part: Trace | CountTrace, tokens: int, seed: int) -> Trace:
    return draw_tokens(part, tokens, seed) if isinstance(part, CountTrace) else part


def first_layers(trace: Trace, layers: int) -> Trace:
    """The trace of a model that was cut behind so many of its layers."""
    weights = trace.topk_weights
    return replace(
        trace,
        topk_ids=np.ascontiguousarray(trace.topk_ids[:, :layers]),
        layer_ids=trace.layer_ids[:layers].copy(),
        topk_weights=None if weights is None else weights[:, :layers].copy(),
    )


def first_tokens(trace: Trace, tokens: int) -> Trace:
    """The beginning of a trace, ids alone: what a run has to be given."""
    return Trace(
        topk_ids=trace.topk_ids[:tokens].copy(),
        num_experts=trace.num_experts,
        layer_ids=trace.layer_ids.copy(),
        ranked=trace.ranked,
        metadata=trace.metadata,
    )


@dataclass(frozen=True, kw_only=True)
class Batches:
    """Sequences of all ranks, cut from a trace one behind the other."""

    ids: NDArray[np.int16]
    """[Q, G, B, S + D, L, K]"""
    prompt: int
    trace: Trace

    @classmethod
    def of(cls, trace: Trace, shape: tuple[int, int, int], prompt: int, decode: int):
        """Pieces of S + D tokens; where the trace ends it begins again."""
        length = prompt + decode
        number = np.arange(int(np.prod(shape)) * length) % trace.num_tokens
        ids = trace.topk_ids[number]
        return cls(
            ids=ids.reshape(*shape, length, *ids.shape[1:]), prompt=prompt, trace=trace
        )

    def prefill(self, batch: int) -> NDArray[np.int16]:
        """[G, T, L, K] of the prompts, T = B S."""
        return self._flat(self.ids[batch, :, :, : self.prompt])

    def decoded(self, batch: int, step: int) -> NDArray[np.int16]:
        """[G, B, L, K] of the tokens that come next."""
        place = self.prompt + step
        return self._flat(self.ids[batch, :, :, place : place + 1])

    def _flat(self, ids: NDArray[np.int16]) -> NDArray[np.int16]:
        return ids.reshape(len(ids), -1, *ids.shape[3:])

    def as_trace(self, steps: list[NDArray[np.int16]]) -> Trace:
        """The steps as a run that was recorded: home, step and row of each token."""
        ranks, rows = steps[0].shape[:2]
        per_step = ranks * rows
        number = np.arange(len(steps) * per_step)
        home = number % per_step // rows
        return Trace(
            topk_ids=np.ascontiguousarray(
                np.concatenate([ids.reshape(-1, *ids.shape[2:]) for ids in steps])
            ),
            num_experts=self.trace.num_experts,
            layer_ids=self.trace.layer_ids,
            home_rank=home.astype(np.int16),
            sequence=(number // per_step * ranks + home).astype(np.int32),
            position=(number % rows).astype(np.int32),
            ranked=self.trace.ranked,
        )
