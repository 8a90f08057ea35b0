"""Ranks that take other times for the same experts, where that is no chance."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Sequence

    from moetuner.calibration.samples import ExpertsSample

MIN_RATIO = 1.05
"""Less than this apart are ranks of one kind."""
_SHARE = 0.75  # of the loads that must tell two ranks apart
_MIN_SAMPLES = 3  # of a curve


@dataclass(frozen=True, kw_only=True, slots=True)
class RankGroup:
    """Ranks of one kind, and times of the slowest of them."""

    ranks: tuple[int, ...]
    """Empty where all ranks are meant."""
    samples: tuple[ExpertsSample, ...]
    ratio: float = 1.0
    """How long they take beside the usual ranks, the median."""


def rank_groups(samples: Sequence[ExpertsSample]) -> list[RankGroup]:
    """The usual ranks, then others, fast ones first; one group where none differ.

    Two ranks differ where in three quarters of the loads their times are further apart
    than both spreads together, the same way, and `MIN_RATIO` apart in the median. The
    usual ranks are the largest group.
    """
    if len(samples) < _MIN_SAMPLES or not all(len(s.of_ranks) > 1 for s in samples):
        return [RankGroup(ranks=(), samples=tuple(samples))]
    took = np.array([[t.seconds for t in s.of_ranks] for s in samples])
    spread = np.array([[t.spread for t in s.of_ranks] for s in samples])
    pace = np.median(took / took.mean(axis=1, keepdims=True), axis=0)
    groups: list[list[int]] = []
    for rank in np.argsort(pace, kind="stable").tolist():
        first = groups[-1][0] if groups else rank
        gap = took[:, rank] - took[:, first]
        beyond = np.mean(gap > spread[:, rank] + spread[:, first]) >= _SHARE
        ratio = float(np.median(took[:, rank] / took[:, first]))
        if not groups or (beyond and ratio >= MIN_RATIO):
            groups.append([])
        groups[-1].append(rank)
    if len(groups) == 1:
        return [RankGroup(ranks=(), samples=tuple(samples))]
    usual = max(groups, key=len)  # of two as large the faster one
    groups = [usual, *(ranks for ranks in groups if ranks is not usual)]
    slowest = [took[:, ranks].max(axis=1) for ranks in groups]
    return [
        RankGroup(
            ranks=tuple(sorted(ranks)),
            samples=tuple(_of_slowest(sample, ranks) for sample in samples),
            ratio=float(np.median(seconds / slowest[0])),
        )
        for ranks, seconds in zip(groups, slowest, strict=True)
    ]


def _of_slowest(sample: ExpertsSample, ranks: Sequence[int]) -> ExpertsSample:
    slowest = max((sample.of_ranks[rank] for rank in ranks), key=lambda t: t.seconds)
    return replace(sample, timing=slowest)
