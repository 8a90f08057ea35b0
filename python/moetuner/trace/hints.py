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
SAMPLE_TOKENS = 8192
"""Of a block, about, that are looked at."""
EVERY = 0.999
"""Share of the tokens that counts as all of them."""
REPEATED = 0.01
"""Share of the tokens in one and the same row that is more than chance."""
_MIN_ENTRIES = 8  # ids of a token; shorter rows are alike by chance
_MAX_ENTRIES = 32  # of them that are compared
_MAX_ROWS = 1 << 16  # different repeated rows that are remembered


class TraceHints:
    """Looks at the blocks of a trace in turn, at a sample of each large one."""

    def __init__(self) -> None:
        self._load: NDArray[np.int64] | None = None
        self._layer_ids: list[int] = []
        self._tokens = 0
        self._starts = 0
        self._rows: dict[int, int] = {}
        self._weights: NDArray[np.uint64] | None = None

    def add(self, block: Trace) -> None:
        """Look at a block of tokens."""
        sample = slice(None, None, max(block.num_tokens // SAMPLE_TOKENS, 1))
        ids = block.topk_ids[sample]
        if not len(ids):
            return
        self._tokens += len(ids)
        self._layer_ids = block.layer_ids.tolist()
        self._count(ids)
        if block.sequence is not None:
            first = np.ones(block.num_tokens, bool)
            first[1:] = block.sequence[1:] != block.sequence[:-1]
            self._starts += int(first[sample].sum())
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
        often = max(MIN_TOKENS, REPEATED * self._tokens, 2 * self._starts)
        if most >= often:
            share = sum(n for n in self._rows.values() if n >= often) / self._tokens
            found.append(
                f"{share:.1%} of the tokens have one of a few rows that are the same "
                f"at every layer: dummy batches (warm-up, profiling) were recorded; "
                f"leave them out of the recording"
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
        """Count rows that came before, told by a few of their entries."""
        flat = ids.reshape(len(ids), -1)
        flat = flat[:, :: max(flat.shape[1] // _MAX_ENTRIES, 1)].astype(np.uint64)
        if self._weights is None:
            rng = np.random.default_rng(0)
            odd = rng.integers(1, 1 << 63, flat.shape[1], np.uint64) | np.uint64(1)
            self._weights = odd
        hashes, counts = np.unique(flat @ self._weights, return_counts=True)
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
        if too_many := _more_than_tokens(trace):
            return (too_many,)
        return tuple(_everywhere(load, tokens, trace.layer_ids.tolist()))
    # Without top-k: an expert whose load is the same whole share 1/k at every layer
    # and in every group, which no routed expert's is.
    sums = trace.counts.sum(axis=2)
    used = sums > 0
    counts, largest = trace.counts[used], trace.counts.max(axis=2)[used]
    for expert in np.flatnonzero(load.all(axis=0)):
        own = counts[:, expert]
        share = own / sums[used]
        k = round(1 / float(share.mean()))
        if (own < largest).any() or (counts == own[:, None]).all():
            continue  # every token has it, so none has more; alike, they say nothing
        if (
            1 < k < trace.num_experts
            and share.size > 1
            and np.allclose(share, 1 / k, rtol=1e-6)
        ):
            return (_text(int(expert), trace.layer_ids.tolist()),)
    return ()


def _more_than_tokens(trace: CountTrace) -> str:
    """What tells that `top_k` is too large; empty where nothing does."""
    load = trace.counts.sum(axis=0)
    tokens = load.sum(axis=1, keepdims=True) / trace.top_k
    layer, expert = np.unravel_index(int((load - tokens).argmax()), load.shape)
    if load[layer, expert] <= tokens[layer, 0] / EVERY:
        return ""
    return (
        f"expert {expert} at layer {trace.layer_ids[layer]} has more choices than a "
        f"layer has tokens with top-{trace.top_k}: a token chooses an expert once, so "
        f"`top_k` is too large"
    )


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
