"""From one placement to another: which experts move, in an order that memory allows.

Legend: L layers, E experts, G ranks, S slots per rank and layer.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from moetuner.errors import InvalidPlacementError

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from moetuner.placement import Placement


@dataclass(frozen=True, kw_only=True, slots=True)
class Move:
    """One step: `expert` goes from rank `source` to rank `target` at `layer`.

    ``exchanged`` is the expert that goes the other way in the same step, its weights
    taking the place of `expert`'s, or None when `target` has a free slot.
    """

    layer: int
    expert: int
    source: int
    target: int
    exchanged: int | None = None


def moves_between(old: Placement, new: Placement) -> tuple[Move, ...]:
    """Steps from `old` to `new`; no rank ever holds more experts than it has slots.

    Experts go into free slots where there are some; where ranks are full, two experts
    change places, so that a ring of k moves takes k - 1 steps.

    Raises
    ------
    InvalidPlacementError
        When the placements are of different models or ranks, or hold replicas.
    """
    shapes = [(p.num_experts, p.topology, p.layer_ids.tolist()) for p in (old, new)]
    if shapes[0] != shapes[1]:
        raise InvalidPlacementError(
            f"moves_between: wanted two placements of one model on the same ranks, got "
            f"(experts, topology, layers) {shapes[0]} and {shapes[1]}"
        )
    if old.has_replicas or new.has_replicas:
        raise InvalidPlacementError("moves_between: wanted placements without replicas")
    slots = max(old.slots_per_rank, new.slots_per_rank)
    steps: list[Move] = []
    for layer, before, after in zip(
        old.layer_ids.tolist(), old.rank_of(), new.rank_of(), strict=True
    ):
        steps += _layer_moves(layer, before.copy(), after, slots, old)
    return tuple(steps)


def _layer_moves(
    layer: int,
    rank: NDArray[np.int32],
    wanted: NDArray[np.int32],
    slots: int,
    placement: Placement,
) -> list[Move]:
    steps: list[Move] = []
    sizes = np.bincount(rank, minlength=placement.topology.num_ranks)
    while True:
        away = np.flatnonzero(rank != wanted)
        if not away.size:
            return steps
        free = away[sizes[wanted[away]] < slots]
        expert = int(free[0] if free.size else away[0])
        source, target = int(rank[expert]), int(wanted[expert])
        exchanged = None
        if free.size:
            sizes[source] -= 1
            sizes[target] += 1
        else:
            # A full rank that wants one more holds one that belongs elsewhere; best the
            # one that belongs where this one comes from.
            others = away[rank[away] == target]
            home = others[wanted[others] == source]
            exchanged = int(home[0] if home.size else others[0])
            rank[exchanged] = source
        rank[expert] = target
        steps.append(
            Move(
                layer=layer,
                expert=expert,
                source=source,
                target=target,
                exchanged=exchanged,
            )
        )
