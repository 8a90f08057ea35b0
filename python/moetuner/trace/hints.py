"""What in a trace is most likely no routing of the model's traffic.

An expert that every token has is a shared expert, fused into the routed ones: it
belongs on every rank and says nothing about placement. Rows that are the same at every
layer, many times over, are dummy batches (warm-up, profiling, padding).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from moetuner.trace.model import CountTrace, Trace

MIN_TOKENS = 64
"""Fewer tokens show nothing."""
EVERY = 0.999
"""Share of the tokens that counts as all of them."""
REPEATED = 0.01
"""Share of the tokens in one and the same row that is more than chance."""
_MIN_ENTRIES = 8  # ids of a token; shorter rows are alike by chance
_SLICE = 1 << 12  # tokens that are widened at a time
_MAX_ROWS = 1 << 16  # different repeated rows that are remembered


class TraceHints:
    """Looks at the blocks of a trace in turn."""

    def __init__(self) -> None:
        self._load: NDArray[np.int64] | None = None
        self._layer_ids: list[int] = []
        self._tokens = 0
        self._sequences: set[int] = set()
        self._rows: dict[int, int] = {}
        self._weights: NDArray[np.uint64] | None = None

    def add(self, block: Trace) -> None:
        """Count a block of tokens."""
        ids = block.topk_ids
        if not len(ids):
            return
        self._tokens += len(ids)
        self._layer_ids = block.layer_ids.tolist()
        self._count(ids)
        if block.sequence is not None and len(self._sequences) < _MAX_ROWS:
            self._sequences.update(np.unique(block.sequence).tolist())
        if ids.shape[1] * ids.shape[2] >= _MIN_ENTRIES:
            self._hash(ids)

    def texts(self) -> tuple[str, ...]:
        """What was found, in words."""
        if self._load is None or self._tokens < MIN_TOKENS:
            return ()
        found = []
        if self._load.shape[1] > 1:
            found += _everywhere(self._load, self._tokens, self._layer_ids)
        most = max(self._rows.values(), default=0)
        # Every sequence begins with the same token: those are no dummies.
        often = max(MIN_TOKENS, REPEATED * self._tokens, 2 * len(self._sequences))
        if most >= often:
            total = sum(n for n in self._rows.values() if n >= often)
            found.append(
                f"{total:,} of {self._tokens:,} tokens have one of a few rows that are "
                f"the same at every layer: dummy batches (warm-up, profiling) were "
                f"recorded; leave them out of the recording"
            )
        return tuple(found)

    def _count(self, ids: NDArray[np.int16]) -> None:
        size = max(int(ids.max()) + 1, 1)
        if self._load is None or self._load.shape[1] < size:
            load = np.zeros((ids.shape[1], size), np.int64)
            if self._load is not None:
                load[:, : self._load.shape[1]] = self._load
            self._load = load
        for layer in range(ids.shape[1]):
            chosen = ids[:, layer]
            counts = np.bincount(chosen[chosen >= 0])
            self._load[layer, : len(counts)] += counts

    def _hash(self, ids: NDArray[np.int16]) -> None:
        width = ids.shape[1] * ids.shape[2]
        if self._weights is None:
            rng = np.random.default_rng(0)
            odd = rng.integers(1, 1 << 63, width, np.uint64) | np.uint64(1)
            self._weights = odd
        hashes = np.concatenate(
            [
                ids[start : start + _SLICE].reshape(-1, width).astype(np.uint64)
                @ self._weights
                for start in range(0, len(ids), _SLICE)
            ]
        )
        hashes, counts = np.unique(hashes, return_counts=True)
        known = self._rows
        for key, count in zip(hashes.tolist(), counts.tolist(), strict=True):
            if key in known or (count > 1 and len(known) < _MAX_ROWS):
                known[key] = known.get(key, 0) + count


def hints_of(trace: Trace | CountTrace) -> tuple[str, ...]:
    """Hints about a whole trace, or about counts."""
    from moetuner.trace.model import CountTrace

    if isinstance(trace, CountTrace):
        return _hints_of_counts(trace)
    hints = TraceHints()
    hints.add(trace)
    return hints.texts()


def _hints_of_counts(trace: CountTrace) -> tuple[str, ...]:
    load = trace.counts.sum(axis=0)
    tokens = int(trace.num_tokens.sum())
    if tokens < MIN_TOKENS or trace.num_experts < 2:
        return ()
    if trace.top_k is not None:
        if trace.top_k < 2:
            return ()
        return tuple(_everywhere(load, tokens, trace.layer_ids.tolist()))
    # Without top-k: an expert whose load is the same whole share 1/k at every layer
    # and in every group, which no routed expert's is.
    sums = trace.counts.sum(axis=2)
    used = sums > 0
    for expert in np.flatnonzero(load.all(axis=0)):
        share = trace.counts[:, :, expert][used] / sums[used]
        k = round(1 / float(share.mean()))
        if k > 1 and share.size > 1 and np.allclose(share, 1 / k, rtol=1e-6):
            return (_text(int(expert), trace.layer_ids.tolist()),)
    return ()


def _everywhere(
    load: NDArray[np.int64], tokens: int, layer_ids: list[int]
) -> list[str]:
    """The expert that all tokens have, at as many layers as that holds."""
    all_LE = load >= EVERY * tokens
    if not all_LE.any():
        return []
    expert = int(all_LE.sum(axis=0).argmax())
    layers = [n for n, there in zip(layer_ids, all_LE[:, expert], strict=True) if there]
    return [_text(expert, layers)]


def _text(expert: int, layers: list[int]) -> str:
    where = f"layer {layers[0]}" if len(layers) == 1 else f"{len(layers)} layers"
    return (
        f"every token has expert {expert} at {where}: a shared expert that was fused "
        f"into the routed ones? It belongs on every rank; record without fusing it"
    )
