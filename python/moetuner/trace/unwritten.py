"""Rows that an engine handed out and nobody wrote: one rule for every reader.

Buffers begin as zeros, so a row that was never written reads as expert 0. No token has
an expert twice: with two or more experts per token, a row of zeros at one layer was not
written there. With one, a token that reads 0 at *every* MoE layer was not written;
where only one layer routes, nothing tells it from a token of expert 0, and it stays.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from moetuner.trace.model import PADDING

if TYPE_CHECKING:
    from numpy.typing import NDArray


def routing_layers(ids_TLK: NDArray[np.int16]) -> NDArray[np.bool_]:
    """Rows of layers that route some of these tokens, bool [L]; others are dense."""
    lowest = PADDING if ids_TLK.shape[2] > 1 else 0
    written = without_unwritten(ids_TLK)
    routed: NDArray[np.bool_] = written.max(axis=(0, 2), initial=PADDING) > lowest
    return routed


def without_unwritten(
    ids_TLK: NDArray[np.int16], num_routing: int | None = None
) -> NDArray[np.int16]:
    """A copy in which rows that nobody wrote are padding.

    Parameters
    ----------
    ids_TLK
        Expert ids [T, L, K], layers without experts among them if the engine has rows
        for those.
    num_routing
        How many of the layers route, for top-1; None counts those of these tokens.
    """
    ids = np.array(ids_TLK, np.int16)
    if ids.shape[2] > 1:
        ids[(ids == 0).all(axis=2)] = PADDING
        return ids
    if num_routing is None:
        num_routing = int((ids > 0).any(axis=(0, 2)).sum())
    if num_routing > 1:
        ids[(ids == 0).all(axis=(1, 2))] = PADDING
    return ids
