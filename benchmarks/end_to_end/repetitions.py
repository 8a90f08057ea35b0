"""Timed repetitions: variants in turns, then the same by parts.

Legend: L layers, G ranks.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import beside  # noqa: F401
import numpy as np
from clock import Marks, StepParts
from shaper import Lost

if TYPE_CHECKING:
    from collections.abc import Sequence

    from bench import Bench


@dataclass(frozen=True, kw_only=True)
class Limits:
    """How long: repetitions, and seconds after which no other is begun."""

    repeats: int
    seconds: float
    parts: int
    """Repetitions that time parts, after the others."""


@dataclass(frozen=True, kw_only=True)
class Turn:
    """Milliseconds of one repetition, slowest rank."""

    prefill: float
    decode: list[float]
    lost: dict[str, int]
    """By the network that was made, on all nodes together, decoded tokens too."""


def repeat(bench: Bench, limits: Limits) -> list[list[Turn]]:
    """Each repetition begins at another variant, and all run the same batch in it."""
    begun = time.monotonic()
    turns: list[list[Turn]] = [[] for _ in bench.stacks]
    for number in range(limits.repeats):
        over = number > 0 and time.monotonic() - begun > limits.seconds
        if bench.place.told_by_first(over):
            break
        for index in np.roll(np.arange(len(turns)), -number):
            stack = bench.stacks[index]
            stack.install(bench.source)
            batch = number % bench.case.sizes.batches
            before = bench.place.lost()
            mine = [step.milliseconds() for step in bench.steps(stack, batch)]
            every = bench.place.gather((mine, before, bench.place.lost()))
            times, *losses = zip(*every, strict=True)
            prefill, *decode = np.max(times, axis=0).tolist()
            turns[index].append(
                Turn(prefill=prefill, decode=decode, lost=_lost_between(*losses))
            )
    return turns


def _lost_between(before: Sequence[Any], after: Sequence[Any]) -> dict[str, int]:
    """Of ranks' nodes: ranks of one node saw the same, but for moments."""
    ends = [dict(filter(None, seen)) for seen in (before, after)]
    first, last = (
        np.sum([*seen.values()], axis=0, dtype=int) if seen else None for seen in ends
    )
    if first is None:
        return {}
    return dict(zip(Lost._fields, (last - first).tolist(), strict=True))


def take_apart(bench: Bench, limits: Limits) -> list[dict[str, list[Any]]]:
    """Parts of steps: for each variant and phase, one entry a step."""
    found: list[dict[str, list[Any]]] = [
        {"prefill": [], "decode": []} for _ in bench.stacks
    ]
    for number in range(limits.parts):
        for stack, own in zip(bench.stacks, found, strict=True):
            stack.install(bench.source)
            marks = Marks(bench.place)
            hooks = marks.attach(stack)
            batch = number % bench.case.sizes.batches
            prompt, *after = [s.parts(marks) for s in bench.steps(stack, batch)]
            for hook in hooks:
                hook.remove()
            own["prefill"].append(_slowest(bench.place.gather(prompt)))
            ranks = bench.place.gather(after)
            own["decode"] += [_slowest(list(step)) for step in zip(*ranks, strict=True)]
    return found


def _slowest(ranks: list[StepParts]) -> dict[str, float]:
    """Milliseconds of a step by parts, layer by layer those of the slowest rank."""
    layers = np.array([step.layers for step in ranks])  # [G, L, 3]
    dispatch, experts, combine = layers.max(axis=0).sum(axis=0).tolist()
    return {
        "other": max(step.other for step in ranks),
        "dispatch": dispatch,
        "experts": experts,
        "combine": combine,
        "mean_experts": float(layers[:, :, 1].mean(axis=0).sum()),
    }
