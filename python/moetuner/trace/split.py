"""Cutting and joining traces, never inside a sequence."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from moetuner._checks import is_array, is_whole, kind_of
from moetuner._words import amount
from moetuner.errors import InvalidTraceError
from moetuner.trace.model import CountTrace, Trace

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from numpy.typing import NDArray


@dataclass(frozen=True, kw_only=True, slots=True)
class Split:
    """Two disjoint parts of a trace: one to plan on, one to score on.

    Parameters
    ----------
    plan, score
        The parts; both the whole trace where nothing is held out.
    held_out
        Whether `score` holds only what `plan` does not.
    """

    plan: Trace | CountTrace
    score: Trace | CountTrace
    held_out: bool = True


def split_by_sequence(
    trace: Trace | CountTrace, fraction: float = 0.5, seed: int = 0
) -> Split:
    """Split whole requests, sequences or groups of counts at random.

    Answers to one request stay together, as they share its prompt. A trace of one
    sequence, one group or none that is known cannot be split: both parts are all of it,
    and `Split.held_out` says so.

    Parameters
    ----------
    trace
        The trace.
    fraction
        Share of the tokens that goes to the planning part, as nearly as whole
        requests allow; in (0, 1]. 1 holds nothing out.
    seed
        Seed of the shuffle; the same seed gives the same split.

    Raises
    ------
    InvalidTraceError
        When `fraction` is not in (0, 1].
    """
    if not 0 < fraction <= 1:
        raise InvalidTraceError(f"split: fraction must be in (0, 1], got {fraction}")
    _check_seed("split", seed)
    whole = Split(plan=trace, score=trace, held_out=False)
    if isinstance(trace, CountTrace):
        if trace.num_groups < 2 or fraction == 1:
            return whole
        chosen = _choose(trace.num_tokens, fraction, seed)
        return Split(
            plan=_select_groups(trace, chosen), score=_select_groups(trace, ~chosen)
        )
    if trace.sequence is None or fraction == 1:
        return whole
    index = _request_index(trace)
    tokens = np.bincount(index)
    if tokens.size < 2:
        return whole
    chosen = _choose(tokens, fraction, seed)[index]
    return Split(plan=select(trace, chosen), score=select(trace, ~chosen))


def select(trace: Trace, token_mask: NDArray[np.bool_]) -> Trace:
    """Keep the tokens where `token_mask` (bool [T]) is set, in their order."""
    if not is_array(token_mask, np.bool_, 1) or len(token_mask) != trace.num_tokens:
        raise InvalidTraceError(
            f"select: token_mask must be bool [{trace.num_tokens}], got "
            f"{kind_of(token_mask)}"
        )
    kept: dict[str, Any] = {
        name: array[token_mask]
        for name, array in trace.arrays().items()
        if name != "layer_ids"
    }
    return replace(trace, **kept)


def subsample(trace: Trace, max_tokens: int, seed: int = 0) -> Trace:
    """Keep randomly chosen whole sequences while they fit in `max_tokens`.

    Answers to one request stay together.

    Raises
    ------
    InvalidTraceError
        When not even the first drawn sequence fits.
    """
    if trace.num_tokens <= max_tokens:
        return trace
    _check_seed("subsample", seed)
    sequence_index(trace)  # refuses a trace without sequences
    index = _request_index(trace)
    tokens = np.bincount(index)
    order = np.random.default_rng(seed).permutation(tokens.size)
    fits = np.cumsum(tokens[order]) <= max_tokens
    if not fits.any():
        raise InvalidTraceError(
            f"subsample: max_tokens={max_tokens} is less than one sequence "
            f"({amount(tokens[order[0]], 'token')})"
        )
    chosen = np.zeros(tokens.size, bool)
    chosen[order[fits]] = True
    return select(trace, chosen[index])


def merge_traces(traces: Sequence[Trace]) -> Trace:
    """Join traces of one model; sequences stay distinct.

    A per-token field survives when every trace has it. Metadata comes from the first.

    Raises
    ------
    InvalidTraceError
        When experts, layers or top-k differ, or there is nothing to merge.
    """
    if not traces:
        raise InvalidTraceError("merge: wanted at least one trace, got none")
    first = traces[0]
    for other in traces[1:]:
        same = (
            other.num_experts == first.num_experts
            and other.top_k == first.top_k
            and np.array_equal(other.layer_ids, first.layer_ids)
        )
        if not same:
            raise InvalidTraceError(
                f"merge: traces differ in shape: {_shape(first)} and {_shape(other)}"
            )
    merged: dict[str, Any] = {}
    for name in first.arrays():
        parts = [trace.arrays().get(name) for trace in traces]
        if name != "layer_ids" and all(part is not None for part in parts):
            merged[name] = np.concatenate([p for p in parts if p is not None])
    if "sequence" in merged:
        merged["sequence"] = np.concatenate(_distinct(traces, sequence_index))
    if "request" in merged:
        merged["request"] = np.concatenate(_distinct(traces, _request_index))
    merged |= dict.fromkeys(set(first.arrays()) - set(merged) - {"layer_ids"})
    return replace(
        first,
        **merged,
        ranked=all(trace.ranked for trace in traces),
    )


def sequence_index(trace: Trace) -> NDArray[np.int64]:
    """Index 0..Q-1 of each token's sequence, int64 [T]; refuses without sequences."""
    if trace.sequence is None:
        raise InvalidTraceError(
            "this trace does not say which sequence a token belongs to, so it cannot "
            "be split fairly; record the sequence of each"
        )
    return np.unique(trace.sequence, return_inverse=True)[1].astype(np.int64)


def _request_index(trace: Trace) -> NDArray[np.int64]:
    """Index of what must stay together: requests where they are known, int64 [T]."""
    if trace.request is None:
        return sequence_index(trace)
    return np.unique(trace.request, return_inverse=True)[1].astype(np.int64)


def _check_seed(operation: str, seed: Any) -> None:
    if not is_whole(seed) or seed < 0:
        raise InvalidTraceError(
            f"{operation}: seed must be a whole number >= 0, got {seed!r}"
        )


def _choose(tokens: NDArray[np.int64], fraction: float, seed: int) -> NDArray[np.bool_]:
    """Sequences for the first part: a random order, cut nearest to the share."""
    order = np.random.default_rng(seed).permutation(tokens.size)
    ends = np.cumsum(tokens[order])
    nearest = int(np.argmin(np.abs(ends - fraction * ends[-1])))
    count = min(max(nearest + 1, 1), tokens.size - 1)
    chosen = np.zeros(tokens.size, bool)
    chosen[order[:count]] = True
    return chosen


def _select_groups(trace: CountTrace, chosen: NDArray[np.bool_]) -> CountTrace:
    labels = tuple(
        label for label, keep in zip(trace.labels, chosen, strict=False) if keep
    )
    return replace(
        trace,
        counts=trace.counts[chosen],
        num_tokens=trace.num_tokens[chosen],
        labels=labels,
    )


def _distinct(
    traces: Sequence[Trace], index_of: Callable[[Trace], NDArray[np.int64]]
) -> list[NDArray[np.int32]]:
    """Numbers of sequences, or of requests, that no two traces share."""
    parts, offset = [], 0
    for trace in traces:
        index = index_of(trace)
        parts.append((index + offset).astype(np.int32))
        offset += int(index.max()) + 1 if index.size else 0
    return parts


def _shape(trace: Trace) -> str:
    layers = trace.layer_ids.tolist()
    return f"{trace.num_experts} experts, top-{trace.top_k}, layers {layers}"
