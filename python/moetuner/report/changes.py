"""What a comparison's result moves, in words."""

from __future__ import annotations

from typing import TYPE_CHECKING

from moetuner._words import verb
from moetuner.evaluation.moving import fetch_seconds
from moetuner.placement.changes import changes
from moetuner.report.words import size

if TYPE_CHECKING:
    from moetuner.placement.changes import Changes
    from moetuner.planning.scores import Comparison


def changes_in(comparison: Comparison) -> Changes:
    """From what gains are measured against to the result."""
    return changes(
        comparison.baseline.placement,
        comparison.result.placement,
        comparison.cost.shape.expert_bytes,
    )


def seconds_to_move(comparison: Comparison, moved: Changes) -> float:
    """See `moetuner.evaluation.moving.fetch_seconds`."""
    before = comparison.baseline.placement
    return fetch_seconds(moved, before, comparison.cost.hardware)


def words_of(comparison: Comparison, moved: Changes) -> str:
    """What has to move, as a sentence goes on after naming the two placements."""
    most = int(moved.per_rank().max())
    far = int(moved.between_nodes.sum()) * moved.expert_bytes
    several = comparison.topology.num_nodes > 1
    return (
        f"{moved.num_moved:,} of {moved.num_replicas:,} experts "
        f"{verb(moved.num_moved, 'changes', 'change')} ranks, "
        f"{size(moved.bytes_moved)} in all"
        f"{f', {size(far)} of it between nodes' if several else ''}. The busiest rank "
        f"fetches {most:,} ({size(most * moved.expert_bytes)}): "
        f"{seconds_to_move(comparison, moved):.2g} s at the least."
    )
