"""Routing statistics: how often experts are chosen, together, and one after the other.

Legend: L layers, E experts, Q groups.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

import moetuner._core as _core
from moetuner._words import amount
from moetuner.errors import InvalidTraceError, MissingStatisticsError
from moetuner.trace import CountTrace, Trace

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from numpy.typing import NDArray

MAX_BYTES = 1 << 32
"""A file of a few bytes can name 32767 experts, whose pairs would fill the memory."""
_MAX_REPETITIONS = 1e6  # of a trace in a weighted sum: more would leave int64


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class RoutingStatistics:
    """Counts over the tokens of a trace.

    Parameters
    ----------
    num_tokens
        Tokens counted.
    layer_ids
        int32 [L], the model's own layer numbers.
    load
        int64 [L, E], tokens that chose the expert (the paper's P).
    coactivation
        int64 [L, E, E], tokens that chose both; the diagonal is the load. None when
        the source only counted.
    transitions
        int64 [L - 1, E, E], tokens that chose a at one recorded layer and b at the
        next (the paper's R). None when the source only counted.
    """

    num_tokens: int
    layer_ids: NDArray[np.int32]
    load: NDArray[np.int64]
    coactivation: NDArray[np.int64] | None = None
    transitions: NDArray[np.int64] | None = None

    @classmethod
    def from_trace(
        cls,
        trace: Trace | CountTrace,
        *,
        coactivation: bool = True,
        transitions: bool = True,
        num_threads: int = 0,
    ) -> RoutingStatistics:
        """Count a trace on all cores, or on `num_threads`; padding counts nowhere.

        Raises
        ------
        InvalidTraceError
            When the tables would be larger than `MAX_BYTES`.
        """
        if isinstance(trace, CountTrace):
            return cls(
                num_tokens=int(trace.num_tokens.sum()),
                layer_ids=trace.layer_ids,
                load=trace.counts.sum(axis=0, dtype=np.int64),
            )
        per_expert = 1 + trace.num_experts * (coactivation + transitions)
        size = 8 * trace.num_layers * trace.num_experts * per_expert
        if size > MAX_BYTES:
            raise InvalidTraceError(
                f"statistics: {amount(trace.num_layers, 'layer')} of "
                f"{trace.num_experts} experts need tables of "
                f"{size / 2**30:.1f} GiB, at most {MAX_BYTES / 2**30:.0f} are counted"
            )
        counts = _core.count_statistics(
            trace.topk_ids, trace.num_experts, coactivation, transitions, num_threads
        )
        return cls(num_tokens=trace.num_tokens, layer_ids=trace.layer_ids, **counts)

    @classmethod
    def sum(
        cls, parts: Iterable[RoutingStatistics], weights: Sequence[float] = ()
    ) -> RoutingStatistics:
        """Counts of several traces of one model together.

        A table that one of them lacks is None. With ``weights``, what the mean token
        of each counts for: as if traces were repeated until they weigh as asked, so
        that nothing counted is lost; counts are rounded to whole tokens.
        """
        parts = tuple(parts)
        if not parts:
            raise InvalidTraceError("statistics: nothing to add up")
        times = _repetitions(parts, weights) if weights else (1.0,) * len(parts)

        def add(counts: list[NDArray[np.int64]]) -> NDArray[np.int64]:
            scaled = [
                c if t == 1 else np.rint(c * t).astype(np.int64)
                for c, t in zip(counts, times, strict=True)
            ]
            return sum(scaled[1:], start=scaled[0])

        tables: dict[str, Any] = {}
        for name in ("load", "coactivation", "transitions"):
            known = [getattr(part, name) for part in parts]
            missing = any(table is None for table in known)
            tables[name] = None if missing else add(known)
        return cls(
            num_tokens=int(add([np.array(part.num_tokens) for part in parts])),
            layer_ids=parts[0].layer_ids,
            **tables,
        )

    @property
    def num_layers(self) -> int:
        """Number of layers L."""
        return int(self.load.shape[0])

    @property
    def num_experts(self) -> int:
        """Number of experts E."""
        return int(self.load.shape[1])

    @property
    def missing(self) -> tuple[str, ...]:
        """Names of the statistics that the source could not give."""
        names = ("coactivation", "transitions")
        return tuple(name for name in names if getattr(self, name) is None)

    def require_transitions(self, operation: str) -> NDArray[np.int64]:
        """The transitions, or an error that names who needs them."""
        if self.transitions is None:
            raise MissingStatisticsError(
                f"{operation} needs layer-to-layer transitions; this source only "
                f"counted loads. Record which experts each token chose."
            )
        return self.transitions

    def require_coactivation(self, operation: str) -> NDArray[np.int64]:
        """The co-activation, or an error that names who needs it."""
        if self.coactivation is None:
            raise MissingStatisticsError(
                f"{operation} needs same-layer co-activation, which was not counted. "
                f"Record which experts each token chose."
            )
        return self.coactivation


def _repetitions(
    parts: Sequence[RoutingStatistics], weights: Sequence[float]
) -> list[float]:
    """How often each part counts, the one that counts least once; capped."""
    per_token = [w / max(p.num_tokens, 1) for p, w in zip(parts, weights, strict=True)]
    return [min(each / min(per_token), _MAX_REPETITIONS) for each in per_token]
