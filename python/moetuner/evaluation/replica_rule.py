"""Which replica of an expert a token's choice goes to: the rules of the engines.

Replicas of an expert are in the order of their slots, in every engine.

Legend: L layers, E experts, G ranks, P slots.
"""

from __future__ import annotations

import enum
import random
from typing import TYPE_CHECKING

import numpy as np

from moetuner._checks import assert_never
from moetuner.placement.model import EMPTY

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from moetuner.placement.model import Placement

    Slots = NDArray[np.int32]

SGLANG_SEED = 42
"""Of the choice where a rank has no replica near it."""


class ReplicaRule(str, enum.Enum):
    """Which replica a token goes to; see docs/objective.md for where it was read."""

    MOETUNER = "moetuner"
    """On its own rank, else in turn on its node, else in turn all: the ops' rule."""
    VLLM = "vllm"
    """Of all, by a hash of the token's row in the batch of its rank."""
    SGLANG_STATIC = "sglang-static"
    """One slot for each rank and expert: on it, else the first on its node, else
    dealt out at random, with a fixed seed."""
    SGLANG_DYNAMIC = "sglang-dynamic"
    """Of all, at random for every choice: here a fixed draw."""
    VLLM_ASCEND = "vllm-ascend"
    """Of all, by the token's rank."""
    TENSORRT_LLM = "tensorrt-llm"
    """Of all, in turn as the batch of a rank chooses the expert; ranks begin one on."""


def rank_slots(placement: Placement) -> Slots:
    """Slot that each rank has for each expert with `SGLANG_STATIC`, int32 [L, G, E].

    As ``compute_logical_to_rank_dispatch_physical_map`` of SGLang 0.5.23 makes it.
    Layers draw from one generator, one after the other, those without experts too: in
    an exported file they hold the experts in order. So the draws are those of SGLang
    where no slot is empty.
    """
    draws = random.Random(SGLANG_SEED)
    numbers = placement.layer_ids.tolist()
    row_of = dict(zip(numbers, range(len(numbers)), strict=True))
    found = np.full(
        (len(numbers), placement.topology.num_ranks, placement.num_experts),
        EMPTY,
        np.int32,
    )
    unplanned = in_order(placement)
    for number in range(numbers[-1] + 1):
        row = row_of.get(number)
        if row is None:
            _layer_slots(unplanned, placement, draws)
        else:
            found[row] = _layer_slots(placement.slot_experts[row], placement, draws)
    return found


def in_order(placement: Placement) -> Slots:
    """Slots [P] of a layer that nobody planned: experts in order, then the first again.

    No rank holds one twice.
    """
    slots = np.arange(placement.num_slots, dtype=np.int32) % placement.num_experts
    place = np.arange(placement.num_slots) % placement.slots_per_rank
    return np.where(place < placement.num_experts, slots, EMPTY).astype(np.int32)


def slot_shares(placement: Placement, rule: ReplicaRule) -> NDArray[np.float64]:
    """Share of its expert's rows that a slot takes, float64 [L, P], from even homes.

    For sources that only counted. Rules by the rank are exact, others on average; but
    `ReplicaRule.MOETUNER`, which would keep rows on their rank, is an even share too.
    """
    layers = np.arange(placement.num_layers)[:, None]
    experts = placement.slot_experts
    count = placement.num_replicas()[layers, experts]
    even: NDArray[np.float64] = (experts >= 0) / count
    ranks = placement.topology.num_ranks
    if (
        rule is ReplicaRule.MOETUNER
        or rule is ReplicaRule.VLLM
        or rule is ReplicaRule.SGLANG_DYNAMIC
        or rule is ReplicaRule.TENSORRT_LLM
    ):
        return even
    if rule is ReplicaRule.SGLANG_STATIC:
        share = np.zeros(experts.shape)
        chosen = rank_slots(placement).reshape(placement.num_layers, -1)
        np.add.at(share, (np.broadcast_to(layers, chosen.shape), chosen), 1 / ranks)
        return share
    if rule is ReplicaRule.VLLM_ASCEND:
        taken = -(-(ranks - _place_among_replicas(placement)) // count)
        return np.where(experts >= 0, taken / ranks, 0.0)
    return assert_never(rule)


def _place_among_replicas(placement: Placement) -> NDArray[np.int64]:
    """How many slots before it hold the same expert, int64 [L, P]."""
    place = np.zeros(placement.slot_experts.shape, np.int64)
    for row, experts in zip(place, placement.slot_experts, strict=True):
        order = np.argsort(experts, kind="stable")
        _, first, number = np.unique(
            experts[order], return_index=True, return_inverse=True
        )
        row[order] = np.arange(experts.size) - first[number]
    return place


def _layer_slots(row: Slots, placement: Placement, draws: random.Random) -> Slots:
    """Slot of each rank for each expert of a layer, int32 [G, E]."""
    topology, width = placement.topology, placement.slots_per_rank
    found = np.full((topology.num_ranks, placement.num_experts), EMPTY, np.int32)
    (filled,) = np.nonzero(row >= 0)
    order = filled[np.argsort(row[filled], kind="stable")]
    experts, first, count = np.unique(row[order], return_index=True, return_counts=True)
    found[:, experts[count == 1]] = order[first[count == 1]]
    nodes = topology.nodes()
    for expert, begin, number in zip(
        experts[count > 1].tolist(),
        first[count > 1].tolist(),
        count[count > 1].tolist(),
        strict=True,
    ):
        slots = order[begin : begin + number]
        near = found[:, expert]
        on_node = nodes[slots // width] == nodes[:, None]  # [G, replicas]
        some = on_node.any(axis=1) & ~on_node.all(axis=1)
        near[some] = slots[on_node.argmax(axis=1)][some]
        near[slots // width] = slots
        far = np.flatnonzero(near == EMPTY)
        if far.size:
            near[far] = _fair_choices(slots.tolist(), far.size, draws)
    return found


def _fair_choices(slots: list[int], count: int, draws: random.Random) -> list[int]:
    """`count` of the slots at random, each as often as the others or once more."""
    whole, rest = divmod(count, len(slots))
    chosen = slots * whole + draws.sample(slots, k=rest)
    draws.shuffle(chosen)
    return chosen
