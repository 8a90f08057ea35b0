"""Counts as a trace: which layers they are of, and how many tokens stand behind them.

One rule for every source that only counted. A layer that no group counted anything at
has no experts (or was not recorded) and is left out, and so is a group of nothing. The
tokens of a group are the choices of its fullest layer over top-k, rounded up; without
top-k they are not known, and choices stand in their place.

Legend: Q groups, L layers, E experts.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np

from moetuner.errors import InvalidTraceError
from moetuner.trace.model import CountTrace, Trace, TraceMetadata

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray


def counted(
    counts_QLE: NDArray[np.int64],
    *,
    layer_ids: NDArray[np.int32] | None = None,
    top_k: int | None = None,
    num_tokens: NDArray[np.int64] | None = None,
    labels: Sequence[str] = (),
    metadata: TraceMetadata | None = None,
) -> CountTrace:
    """Counts per group, layer and expert as a trace.

    Parameters
    ----------
    counts_QLE
        Tokens of each group routed to each expert, int64.
    layer_ids
        int32 [L], the model's own numbers; None numbers the rows from 0.
    top_k
        Experts per token, or None where nobody says.
    num_tokens
        int64 [Q], where the source says that too.
    labels
        Name of each group; may be empty.
    metadata
        Model, source, dataset.

    Raises
    ------
    InvalidTraceError
        When nothing was counted, or the numbers contradict each other.
    """
    if counts_QLE.ndim != 3 or not counts_QLE.size:
        raise InvalidTraceError(
            f"counts must be [groups, layers, experts], none of them empty, got "
            f"{list(counts_QLE.shape)}"
        )
    if counts_QLE.min() < 0:
        raise InvalidTraceError(f"counts must be >= 0, got {counts_QLE.min()}")
    groups = np.asarray(counts_QLE.any(axis=(1, 2)))
    layers = np.asarray(counts_QLE.any(axis=(0, 2)))
    if not groups.any():
        raise InvalidTraceError("the recording counted nothing")
    if layer_ids is None:
        layer_ids = np.arange(counts_QLE.shape[1], dtype=np.int32)
    if num_tokens is not None and num_tokens.shape != groups.shape:
        raise InvalidTraceError(
            f"tokens must be [{len(groups)}], one number per group, got "
            f"{list(num_tokens.shape)}"
        )
    if labels and len(labels) != len(groups):
        raise InvalidTraceError(f"{len(labels)} labels for {len(groups)} groups")
    counts = np.ascontiguousarray(counts_QLE[groups][:, layers])
    trace = CountTrace(
        counts=counts,
        num_tokens=_choices(counts) if num_tokens is None else num_tokens[groups],
        layer_ids=layer_ids[layers],
        labels=tuple(n for n, kept in zip(labels, groups, strict=False) if kept),
        metadata=metadata or TraceMetadata(),
        tokens_known=num_tokens is not None,
    )
    if top_k is None or trace.tokens_known:
        return trace
    return counts_with_top_k(trace, top_k)


def with_top_k(trace: Trace | CountTrace, top_k: int | None) -> Trace | CountTrace:
    """The trace with tokens counted for `top_k` experts each; None leaves it as it is.

    Raises
    ------
    InvalidTraceError
        When the trace says another top-k itself, or has fewer experts.
    """
    if top_k is None:
        return trace
    if isinstance(trace, CountTrace):
        return counts_with_top_k(trace, top_k)
    _check_top_k(trace, top_k)
    return trace


def counts_with_top_k(trace: CountTrace, top_k: int) -> CountTrace:
    """Counts with tokens that have `top_k` experts each.

    Raises
    ------
    InvalidTraceError
        When the counts say another top-k themselves, or are of fewer experts.
    """
    _check_top_k(trace, top_k)
    if trace.tokens_known:
        return trace
    tokens = -(-_choices(trace.counts) // top_k)
    return replace(trace, num_tokens=tokens, tokens_known=True)


def _check_top_k(trace: Trace | CountTrace, top_k: int) -> None:
    if trace.top_k not in (None, top_k):
        raise InvalidTraceError(
            f"`top_k` is {top_k}, but the recording says {trace.top_k} experts "
            f"per token: leave it out"
        )
    if not 1 <= top_k <= trace.num_experts:
        raise InvalidTraceError(
            f"`top_k` is {top_k}, the counts are of {trace.num_experts} experts"
        )


def _choices(counts_QLE: NDArray[np.int64]) -> NDArray[np.int64]:
    """Choices of experts at each group's fullest layer, int64 [Q]."""
    choices: NDArray[np.int64] = counts_QLE.sum(axis=2, dtype=np.int64).max(axis=1)
    return choices
