"""Whose replica rule an engine has, and which one a placement was planned under."""

from __future__ import annotations

from typing import TYPE_CHECKING

from moetuner._checks import assert_never
from moetuner.evaluation.replica_rule import ReplicaRule
from moetuner.export.engine import Engine

if TYPE_CHECKING:
    from moetuner.placement.model import Placement


def rules_of(engine: Engine) -> tuple[ReplicaRule, ...]:
    """Rules that an engine may choose replicas by, its default first; none is any."""
    if engine is Engine.SGLANG:
        return ReplicaRule.SGLANG_STATIC, ReplicaRule.SGLANG_DYNAMIC
    if engine is Engine.TRTLLM:
        return (ReplicaRule.TENSORRT_LLM,)
    if engine is Engine.VLLM_ASCEND:  # Model Runner V2 has vLLM's
        return ReplicaRule.VLLM_ASCEND, ReplicaRule.VLLM
    if engine is Engine.VLLM or engine is Engine.VLLM_START_MAP:
        return (ReplicaRule.VLLM,)
    if engine is Engine.EPLB or engine is Engine.DEEPEP:
        return ()
    return assert_never(engine)


def planned_rule(placement: Placement) -> ReplicaRule | None:
    """The rule that a placement was planned under; None when it does not say.

    Plans of versions that knew one rule were made under that.
    """
    cost = placement.provenance.options.get("cost")
    if not isinstance(cost, dict):
        return None
    told = cost.get("replica_rule", ReplicaRule.MOETUNER.value)
    return ReplicaRule(told) if told in [rule.value for rule in ReplicaRule] else None


def other_rule_note(placement: Placement, engine: Engine) -> tuple[str, ...]:
    """That the engine sends tokens to other replicas than the plan was scored with."""
    rules, planned = rules_of(engine), planned_rule(placement)
    if planned is None or planned in rules:
        return ()
    if not rules or not placement.has_replicas:
        return ()
    names = " or ".join(rule.value for rule in rules)
    return (
        f"planned under the replica rule {planned.value}, but {engine.value} chooses "
        f"replicas by {names}: plan again with `replica_rule` {rules[0].value}",
    )
