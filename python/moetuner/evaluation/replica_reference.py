"""Readable twin of the core's choice among replicas: slow, plain, to test it with."""

from __future__ import annotations

import random
from typing import TYPE_CHECKING, Any

import numpy as np

from moetuner._checks import assert_never
from moetuner.evaluation.cost import Homes
from moetuner.evaluation.replica_rule import SGLANG_SEED, ReplicaRule, in_order

if TYPE_CHECKING:
    from moetuner.placement.model import Placement
    from moetuner.trace import Trace


class ReplicaChoice:
    """Which of its replicas a token takes, by a rule."""

    def __init__(
        self,
        trace: Trace,
        placement: Placement,
        homes: Homes,
        rule: ReplicaRule,
        groups: Any,
    ) -> None:
        self.trace, self.placement, self.rule = trace, placement, rule
        self.per_node = placement.topology.ranks_per_node
        num_ranks = placement.topology.num_ranks
        self.source_rows: dict[tuple[int, int], list[int]] = {}
        """Tokens of each group and rank, in the order of their rows."""
        self.source: list[tuple[int, int]] = []
        dealt: dict[int, int] = {}
        for token in range(trace.num_tokens):
            group = int(groups[token])
            if homes is Homes.RECORDED:
                assert trace.home_rank is not None
                rank = int(trace.home_rank[token])
            else:
                rank = dealt.get(group, 0) % num_ranks
                dealt[group] = dealt.get(group, 0) + 1
            self.source.append((group, rank))
            self.source_rows.setdefault((group, rank), []).append(token)
        self.static = self._static() if rule is ReplicaRule.SGLANG_STATIC else []

    def slot(self, token: int, layer: int, home: int, expert: int) -> int:
        """The slot of a token's expert."""
        slots = self._slots(self.placement.slot_experts[layer], expert)
        if self.rule is ReplicaRule.MOETUNER:
            nearest = self._on(slots, home) or self._near(slots, home) or slots
            return nearest[token % len(nearest)]
        if self.rule is ReplicaRule.VLLM:
            row = self.source_rows[self.source[token]].index(token)
            return slots[row * 2654435769 % (1 << 32) % len(slots)]
        if self.rule is ReplicaRule.SGLANG_STATIC:
            return self.static[layer][expert][home]
        if self.rule is ReplicaRule.SGLANG_DYNAMIC:
            drawn = _mixed(_mixed(token) ^ (layer << 32 | expert)) >> 1
            return slots[drawn % len(slots)]
        if self.rule is ReplicaRule.VLLM_ASCEND:
            return slots[home % len(slots)]
        if self.rule is ReplicaRule.TENSORRT_LLM:
            return slots[(self._turn(token, layer, expert) + home) % len(slots)]
        return assert_never(self.rule)

    def _turn(self, token: int, layer: int, expert: int) -> int:
        """Earlier choices of the expert in a block of 1024, and the block's number."""
        rows = self.source_rows[self.source[token]]
        choices: list[int] = self.trace.topk_ids[rows, layer].ravel().tolist()
        own: int = self.trace.topk_ids[token, layer].tolist().index(expert)
        at = rows.index(token) * self.trace.top_k + own
        block = at // 1024
        return choices[block * 1024 : at].count(expert) + block

    def _static(self) -> list[list[list[int]]]:
        """Slot by layer, expert and rank."""
        draws = random.Random(SGLANG_SEED)
        planned = self.placement.layer_ids.tolist()
        found = []
        for layer in range(planned[-1] + 1):
            row = in_order(self.placement)
            if layer in planned:
                row = self.placement.slot_experts[planned.index(layer)]
            slots = [
                self._static_slots(self._slots(row, expert), draws)
                for expert in range(self.placement.num_experts)
            ]
            if layer in planned:
                found.append(slots)
        return found

    def _static_slots(self, slots: list[int], draws: random.Random) -> list[int]:
        """Slot of each rank, of all `slots` of an expert."""
        found: list[int | None] = []
        for rank in range(self.placement.topology.num_ranks):
            on, near = self._on(slots, rank), self._near(slots, rank)
            nearest = on or (near if len(near) < len(slots) else [])
            found.append(slots[0] if len(slots) == 1 else next(iter(nearest), None))
        far = found.count(None)
        if far:
            dealt = slots * (far // len(slots)) + draws.sample(slots, far % len(slots))
            draws.shuffle(dealt)
        return [dealt.pop(0) if slot is None else slot for slot in found]

    def _slots(self, row: Any, expert: int) -> list[int]:
        slots: list[int] = np.flatnonzero(row == expert).tolist()
        return slots

    def _on(self, slots: list[int], rank: int) -> list[int]:
        width = self.placement.slots_per_rank
        return [slot for slot in slots if slot // width == rank]

    def _near(self, slots: list[int], rank: int) -> list[int]:
        width, node = self.placement.slots_per_rank, rank // self.per_node
        return [slot for slot in slots if slot // width // self.per_node == node]


def _mixed(bits: int) -> int:
    """SplitMix64."""
    bits = (bits + 0x9E3779B97F4A7C15) % (1 << 64)
    bits = (bits ^ (bits >> 30)) * 0xBF58476D1CE4E5B9 % (1 << 64)
    bits = (bits ^ (bits >> 27)) * 0x94D049BB133111EB % (1 << 64)
    return bits ^ (bits >> 31)
