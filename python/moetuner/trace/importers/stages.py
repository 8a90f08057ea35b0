"""Stages of a pipeline: ranks that recorded the same tokens at different layers."""

from __future__ import annotations

from collections import defaultdict
from itertools import combinations
from typing import TYPE_CHECKING, TypeVar

from moetuner.errors import InvalidTraceError

if TYPE_CHECKING:
    from collections.abc import Collection, Mapping

Rank = TypeVar("Rank", int, tuple[int, int])


def join_stages(layers_of: Mapping[Rank, Collection[int]]) -> list[tuple[Rank, ...]]:
    """Ranks of one pass, those that are stages of one pipeline together.

    Stages have layers of their own, and as many ranks each: the first rank of every
    stage is one pipeline, as engines number ranks with the stage outermost.

    Parameters
    ----------
    layers_of
        The layers that each rank recorded.

    Raises
    ------
    InvalidTraceError
        When ranks recorded different layers that overlap, or in unequal numbers.
    """
    stages: dict[frozenset[int], list[Rank]] = defaultdict(list)
    for rank in sorted(layers_of):
        stages[frozenset(layers_of[rank])].append(rank)
    apart = all(not one & other for one, other in combinations(stages, 2))
    if not apart or len({len(ranks) for ranks in stages.values()}) > 1:
        sizes = sorted(len(layers) for layers in stages)
        raise InvalidTraceError(
            f"ranks recorded different layers (sets of {sizes[:8]}), which are no "
            f"stages of a pipeline: those have no layer in common, and as many ranks "
            f"each"
        )
    return list(zip(*stages.values(), strict=True))
