"""The figures of a result file: medians, tails, changes, and what stands beside them.

Legend: R repetitions.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import combinations
from typing import TYPE_CHECKING, Any

import numpy as np
from variants import BASELINE, CONTIGUOUS, OUR_PLANS, OURS, WITH_REPLICAS

if TYPE_CHECKING:
    from collections.abc import Sequence

PHASES = ("prefill", "decode")
PAPER = {  # arXiv 2502.06643, Mixtral-8x7B against contiguous blocks: %, tails and step
    "one node": (-36.0, -36.3, -9.3),
    "two nodes": (-27.0, -30.5, -17.5),
}


@dataclass(frozen=True, kw_only=True)
class Spread:
    """A median, and the quartiles around it."""

    low: float
    median: float
    high: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread:
        low, median, high = np.percentile(values, (25, 50, 75))
        return cls(low=float(low), median=float(median), high=float(high))

    @property
    def width(self) -> float:
        """Between the quartiles."""
        return self.high - self.low


class Figures:
    """One variant of one case."""

    def __init__(self, case: dict[str, Any], result: dict[str, Any]) -> None:
        self.case, self.result = case, result
        self.name: str = result["variant"]

    def samples(self, phase: str) -> np.ndarray:
        """Milliseconds of each step, [R] or, of decoding, [R, steps]."""
        return np.array(self.result[f"{phase}_ms"])

    def losses(self) -> list[tuple[int, dict[str, int]]]:
        """By repetition, from 1: what the network lost; none where none was made."""
        return [
            (n, lost) for n, lost in enumerate(self.result.get("lost", ()), 1) if lost
        ]

    def step(self, phase: str) -> Spread:
        """Milliseconds."""
        return Spread.of(self.samples(phase).ravel())

    def tail(self, phase: str, percent: float) -> float:
        """Milliseconds that so many of the steps stay below."""
        return float(np.percentile(self.samples(phase), percent))

    def tokens_per_second(self, phase: str) -> float:
        """Of all ranks together, at the median step."""
        sizes, ranks = self.case["sizes"], self.case["topology"]["num_ranks"]
        per_sequence = sizes["prompt"] if phase == PHASES[0] else 1
        tokens = ranks * sizes["sequences"] * per_sequence
        return tokens / self.step(phase).median * 1e3

    def part(self, phase: str, name: str) -> float:
        """Median milliseconds of a part of the step."""
        return float(np.median([one[name] for one in self.result["parts"][phase]]))

    def token_tail(self, phase: str) -> float:
        """The paper's of token processing: layer by layer the slowest rank."""
        return self.part(phase, "experts")

    def exchange_tail(self, phase: str) -> float:
        """The paper's of all-to-all: layer by layer the slowest rank."""
        parts = self.result["parts"][phase]
        return float(np.median([one["dispatch"] + one["combine"] for one in parts]))

    def tail_changes(self, other: Figures, phase: str) -> tuple[float, float]:
        """In %: of the tail of token processing, and of that of all-to-all."""
        token, exchange = (
            100 * (mine / its - 1) if its else 0.0
            for mine, its in (
                (self.token_tail(phase), other.token_tail(phase)),
                (self.exchange_tail(phase), other.exchange_tail(phase)),
            )
        )
        return token, exchange

    def change(self, other: Figures, phase: str) -> Spread:
        """In %, repetition by repetition: both ran the same batch then."""
        mine, its = (
            each.samples(phase).reshape(len(each.samples(phase)), -1).sum(axis=1)
            for each in (self, other)
        )
        return Spread.of(100 * (mine / its - 1))


def rivals(found: dict[str, Figures], phase: str) -> dict[str, Figures]:
    """By each plan of ours on our exchange: the fastest other with as many slots."""
    on_ours = {
        one.result["placement"]: one
        for one in found.values()
        if one.result["exchange"] == OURS
    }
    best = {}
    for name in OUR_PLANS & on_ours.keys():
        others = [
            one
            for other, one in on_ours.items()
            if other not in OUR_PLANS
            and (other in WITH_REPLICAS) <= (name in WITH_REPLICAS)
        ]
        if others:
            best[name] = min(others, key=lambda one: one.step(phase).median)
    return best


def ranked(found: dict[str, Figures], phase: str) -> tuple[int, int]:
    """Pairs of placements on our exchange whose predicted order is the measured one.

    And of how many: those whose medians are further apart than either spread.
    """
    ours = [
        (one.step(phase), one.result["said"][phase]["step"])
        for one in found.values()
        if one.result["exchange"] == OURS and phase in one.result["said"]
    ]
    apart = [
        (first.median - second.median) * (told - other)
        for (first, told), (second, other) in combinations(ours, 2)
        if abs(first.median - second.median) > max(first.width, second.width)
    ]
    return sum(product > 0 for product in apart), len(apart)


def link_of(content: dict[str, Any]) -> str:
    """The rate between nodes, if the run shaped it; else it is only what plans knew."""
    gbit = content["case"]["gbit"]
    if not gbit:
        return ""
    return f", {'' if content['shaped'] else 'planned for '}{gbit:g} Gbit/s"


def kind_of(case: dict[str, Any]) -> str:
    """Of the paper's two, by the nodes of a case."""
    topology = case["topology"]
    one_node = topology["num_ranks"] == topology["ranks_per_node"]
    return "one node" if one_node else "two nodes"


def figures_of(case: dict[str, Any]) -> dict[str, Figures]:
    """By the variant's name."""
    return {
        result["variant"]: Figures(case["case"], result) for result in case["results"]
    }


def reference(found: dict[str, Figures], *, stack: bool = False) -> Figures | None:
    """What changes are against: contiguous blocks, on ours or the paper's stack."""
    return found.get((BASELINE if stack else CONTIGUOUS).name)
