"""Pairs of ranks whose messages take other times than most of their level."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from moetuner.calibration.samples import Level

if TYPE_CHECKING:
    from collections.abc import Sequence

    from moetuner.calibration.samples import PairSample

MIN_RATIO = 1.25
"""Less than this apart are links of one kind: single messages scatter."""


def slow_pairs(pairs: Sequence[PairSample]) -> list[str]:
    """What is to be said of each level, of which some pairs are slower than most.

    A pair is slow where it takes longer than the median of its level by more than twice
    both spreads, and `MIN_RATIO` times as long.
    """
    found = []
    for level in Level:
        own = [pair for pair in pairs if pair.level is level]
        if len(own) < 3:
            continue
        took = np.array([pair.timing.seconds for pair in own])
        spread = np.array([pair.timing.spread for pair in own])
        usual = np.median(took)
        beyond = took - usual > 2 * (spread + np.median(spread))
        slow = np.flatnonzero(beyond & (took >= MIN_RATIO * usual))
        if slow.size:
            worst = own[slow[took[slow].argmax()]]
            found.append(
                f"links between {level.value}s: {slow.size} of {len(own)} pairs are "
                f"slower than the others, most from rank {worst.source} to "
                f"{worst.target}, {worst.timing.seconds / usual:.2f} times: [pairs] "
                f"of a hardware file takes what pairs reach"
            )
    return found
