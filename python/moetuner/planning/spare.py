"""Slots that a plan leaves empty, and what an engine's filling of them costs.

Engines have no empty slots. Where no replica pays, whatever an export puts there makes
ranks read more weights: a plan for such an engine has to say so.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from moetuner._words import SHOWN, amount, verb
from moetuner.evaluation.evaluate import evaluate
from moetuner.evaluation.replica_rule import ReplicaRule
from moetuner.export import fill_slots
from moetuner.placement.model import EMPTY
from moetuner.trace.statistics import RoutingStatistics

if TYPE_CHECKING:
    from moetuner.placement.model import Placement
    from moetuner.planning.options import Pricing
    from moetuner.planning.scores import Comparison


@dataclass(frozen=True, kw_only=True, slots=True)
class SpareSlots:
    """Empty slots of a plan, why, and what filling them costs."""

    num_empty: int
    """Over all layers."""
    why: str
    spare: bool
    """Whether fewer slots per rank would hold all experts."""
    rule: ReplicaRule
    seconds: float
    """Modelled time of the mean batch as planned."""
    filled_seconds: float | None
    """The same with the coldest expert that its rank lacks in every empty slot; None
    where our own layer runs the plan, which leaves them empty."""

    def words(self) -> str:
        """For people."""
        said = (
            f"{amount(self.num_empty, 'slot')} {verb(self.num_empty, 'is', 'are')} "
            f"empty: {self.why}."
        )
        if self.filled_seconds is None:
            return (
                f"{said} moetuner.nn.MoELayer leaves them empty. For an engine, which "
                f"has to fill them, plan by its replica rule."
            )
        said += " Engines have no empty slots. Export fills them with the coldest "
        change = self.filled_seconds / self.seconds - 1
        if abs(change) < SHOWN:
            return f"{said}experts, and a batch then takes as long."
        advice = (
            " Fewer slots per rank are faster." if change > 0 and self.spare else ""
        )
        return (
            f"{said}experts, and a batch then takes {self.filled_seconds * 1e3:.4g} "
            f"ms, not {self.seconds * 1e3:.4g} ms ({change:+.1%}).{advice}"
        )


def spare_slots(comparison: Comparison, pricing: Pricing) -> SpareSlots | None:
    """What filling the result's empty slots costs on the tokens that are scored.

    None where there are none, where ranks have more slots than there are experts, and
    where our own layer runs a plan that has no slots to spare for replicas.
    """
    placement = comparison.result.placement
    empty = int((placement.slot_experts == EMPTY).sum())
    rule = pricing.cost.replica_rule
    before = comparison.result.evaluation.batch_seconds_mean
    full = placement.slots_per_rank > placement.num_experts
    own = rule is ReplicaRule.MOETUNER
    why = _why(placement, comparison.result.name, rule)
    if not empty or full or not before > 0 or (own and not _has_spare(placement)):
        return None
    return SpareSlots(
        num_empty=empty,
        why=why,
        spare=_has_spare(placement),
        rule=rule,
        seconds=before,
        filled_seconds=None if own else _filled_seconds(comparison, pricing),
    )


def _has_spare(placement: Placement) -> bool:
    ranks = placement.topology.num_ranks
    return placement.slots_per_rank > -(-placement.num_experts // ranks)


def _why(placement: Placement, solver: str, rule: ReplicaRule) -> str:
    if not _has_spare(placement):
        return (
            f"{placement.num_experts} experts do not fill the {placement.num_slots} "
            f"slots of a layer"
        )
    if solver != "joint":
        return f"{solver} puts no replica there"
    return f"no replica tried there pays under the replica rule {rule.value}"


def _filled_seconds(comparison: Comparison, pricing: Pricing) -> float:
    placement = comparison.result.placement
    counted = RoutingStatistics.from_trace(
        comparison.scored, coactivation=False, transitions=False
    )
    slots = fill_slots(placement, load=counted.load).slots
    return evaluate(
        comparison.scored,
        replace(placement, slot_experts=slots),
        pricing.cost,
        batch_tokens=pricing.batch_tokens,
        batch_kind=pricing.batch_kind,
    ).batch_seconds_mean
