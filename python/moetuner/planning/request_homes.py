"""What homes by routing gain over homes by lengths: the second stage, scored apart.

See `moetuner.planning.request_affinity` for how homes are chosen.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from moetuner._checks import is_whole
from moetuner.errors import InvalidProblemError, InvalidTraceError
from moetuner.evaluation.cost import Homes
from moetuner.evaluation.evaluate import Evaluation, evaluate
from moetuner.evaluation.workload import DEFAULT_BATCH_TOKENS, BatchKind
from moetuner.planning.request_affinity import assign_homes
from moetuner.trace import CountTrace, Trace

if TYPE_CHECKING:
    from moetuner.evaluation.cost import CostModel
    from moetuner.placement.model import Placement


@dataclass(frozen=True, kw_only=True, slots=True)
class RequestHomes:
    """How much of a sequence is known when it gets its home.

    Parameters
    ----------
    known_tokens
        Routing of the first so many tokens; None: of all, in hindsight.

    Raises
    ------
    InvalidProblemError
        When it is neither None nor a whole number >= 1.
    """

    known_tokens: int | None = None

    def __post_init__(self) -> None:
        known = self.known_tokens
        if known is not None and (not is_whole(known) or known < 1):
            raise InvalidProblemError(
                f"RequestHomes: known_tokens must be a whole number >= 1, or None for "
                f"all, got {known!r}"
            )

    @property
    def words(self) -> str:
        """What homes are chosen by, for a table."""
        if self.known_tokens is None:
            return "routing, all (hindsight)"
        return f"routing, first {self.known_tokens}"


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class ScoredHomes:
    """One placement with homes of sequences ``recorded``, chosen in two ways."""

    known: RequestHomes
    by_length: Evaluation
    """The baseline: equally many tokens on each rank, routing unknown."""
    by_routing: Evaluation

    @property
    def gain(self) -> float:
        """In the mean batch's time, of routing over lengths; 0.1 is 10 % less."""
        before = self.by_length.batch_seconds_mean
        return 1 - self.by_routing.batch_seconds_mean / before if before else 0.0

    @property
    def batches_faster(self) -> int:
        """Batches that take less time by routing than by lengths."""
        faster = self.by_routing.batch_seconds < self.by_length.batch_seconds
        return int(faster.sum())

    def to_json(self) -> dict[str, Any]:
        """Plain values."""
        return {
            "known_tokens": self.known.known_tokens,
            "homes": Homes.RECORDED.value,
            "gain_in_mean": self.gain,
            "batches_faster": self.batches_faster,
            "by_length": self.by_length.to_json(),
            "by_routing": self.by_routing.to_json(),
        }


def score_homes(
    trace: Trace | CountTrace,
    placement: Placement,
    cost: CostModel,
    known: RequestHomes,
    *,
    batch_tokens: int = DEFAULT_BATCH_TOKENS,
) -> ScoredHomes:
    """Give the sequences of `trace` homes in both ways, batch by batch; score both.

    Homes that the trace has recorded are not looked at.

    Raises
    ------
    InvalidTraceError
        When the trace does not tell sequences apart, or only counted.
    """
    check_sequences(trace)
    assert isinstance(trace, Trace)
    recorded = replace(cost, homes=Homes.RECORDED)
    by_length, by_routing = (
        evaluate(
            assign_homes(
                trace, placement, cost, known_tokens=tokens, batch_tokens=batch_tokens
            ),
            placement,
            recorded,
            batch_tokens=batch_tokens,
        )
        for tokens in (0, known.known_tokens)
    )
    return ScoredHomes(known=known, by_length=by_length, by_routing=by_routing)


def check_sequences(
    trace: Trace | CountTrace, batch_kind: BatchKind = BatchKind.SEQUENCES
) -> None:
    """Refuse a trace whose tokens belong to no sequences, and batches that cut them."""
    if batch_kind is not BatchKind.SEQUENCES:
        raise InvalidProblemError(
            f"request homes: whole sequences get a rank, batch by batch; that needs "
            f"batch_kind=sequences, got {batch_kind.value}"
        )
    if isinstance(trace, CountTrace) or trace.sequence is None:
        raise InvalidTraceError(
            "request homes: wanted a trace with sequences; this one does not tell "
            "which tokens belong together"
        )
