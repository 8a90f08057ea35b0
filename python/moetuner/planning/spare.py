"""Slots that a plan leaves empty, and what an engine's filling of them costs.

Engines have no empty slots. Where no replica pays, whatever an export puts there makes
ranks read more weights: a plan for such an engine has to say so.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from moetuner.evaluation.evaluate import evaluate
from moetuner.evaluation.replica_rule import ReplicaRule
from moetuner.export import fill_slots
from moetuner.placement.model import EMPTY
from moetuner.trace.statistics import RoutingStatistics

if TYPE_CHECKING:
    from moetuner.planning.options import Pricing
    from moetuner.planning.scores import Comparison


@dataclass(frozen=True, kw_only=True, slots=True)
class SpareSlots:
    """What filling the empty slots of a plan costs."""

    num_empty: int
    """Over all layers."""
    rule: ReplicaRule
    seconds: float
    """Modelled time of the mean batch as planned."""
    filled_seconds: float
    """The same with the coldest expert that its rank lacks in every empty slot."""

    def words(self) -> str:
        """For people."""
        change = self.filled_seconds / self.seconds - 1
        advice = "Fewer slots per rank are faster. " if change > 0 else ""
        return (
            f"{self.num_empty:,} slots are empty: no replica tried there pays "
            f"under the replica rule {self.rule.value}. Engines have no empty slots. "
            f"Export fills them with the coldest experts, and a batch then takes "
            f"{self.filled_seconds * 1e3:.4g} ms, not {self.seconds * 1e3:.4g} ms "
            f"({change:+.1%}). {advice}"
        ).strip()


def spare_slots(comparison: Comparison, pricing: Pricing) -> SpareSlots | None:
    """What filling the result's empty slots costs on the tokens that are scored.

    None where there are none, where our own layer runs the plan, which knows empty
    slots, and where ranks have more slots than there are experts.
    """
    placement = comparison.result.placement
    empty = int((placement.slot_experts == EMPTY).sum())
    rule = pricing.cost.replica_rule
    before = comparison.result.evaluation.batch_seconds_mean
    full = placement.slots_per_rank > placement.num_experts
    if rule is ReplicaRule.MOETUNER or not empty or full or not before > 0:
        return None
    counted = RoutingStatistics.from_trace(
        comparison.scored, coactivation=False, transitions=False
    )
    slots = fill_slots(placement, load=counted.load).slots
    after = evaluate(
        comparison.scored,
        replace(placement, slot_experts=slots),
        pricing.cost,
        batch_tokens=pricing.batch_tokens,
        batch_kind=pricing.batch_kind,
    )
    return SpareSlots(
        num_empty=empty,
        rule=rule,
        seconds=before,
        filled_seconds=after.batch_seconds_mean,
    )
