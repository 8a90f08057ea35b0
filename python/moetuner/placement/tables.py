"""Index tables of a placement for one rank: what `moetuner.ops.dispatch` reads.

Legend: L layers, E experts, G ranks, S slots per rank, P = G * S slots, R most slots of
any expert.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from moetuner._checks import is_whole
from moetuner._words import amount
from moetuner.errors import InvalidPlacementError

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from moetuner.placement.model import Placement

ABSENT = -1


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class PlacementTables:
    """Which slots the tokens of one rank may use for each expert; see `of`.

    Token t takes number ``t % num_candidates[l, e]`` of ``candidates[l, e]``: a slot of
    its own rank where there is one (then the only candidate), else those of the same
    node, else all, in slot order. That is the evaluator's replica rule ``moetuner``;
    the ops know no other, whatever engine a placement was planned for.
    """

    rank: int
    candidates: NDArray[np.int32]
    """[L, E, R] slots; -1: no more."""
    num_candidates: NDArray[np.int32]
    """[L, E], at least 1."""
    local_experts: NDArray[np.int32]
    """[L, S] expert of each slot of this rank; -1: empty."""
    layer_ids: NDArray[np.int32]
    """[L] the model's own layer numbers."""
    num_experts: int
    num_ranks: int
    ranks_per_node: int
    slots_per_rank: int
    fingerprint: str
    """Of the placement, hexadecimal; equal on all ranks."""

    @classmethod
    def of(cls, placement: Placement, rank: int) -> PlacementTables:
        """The tables of `rank`, from the placement alone: nothing is exchanged.

        Raises
        ------
        InvalidPlacementError
            When the placement has no such rank.

        Examples
        --------
        Expert 0 has a slot on ranks 0 and 1, so each uses its own:

        >>> import numpy as np
        >>> from moetuner import Placement, PlacementTables, Topology
        >>> placement = Placement(
        ...     slot_experts=np.array([[0, 1, 0, 2]], np.int32),
        ...     layer_ids=np.array([0], np.int32),
        ...     num_experts=3,
        ...     topology=Topology(num_ranks=2, ranks_per_node=2),
        ... )
        >>> PlacementTables.of(placement, 0).candidates[0, :, 0].tolist()
        [0, 1, 3]
        >>> PlacementTables.of(placement, 1).candidates[0, :, 0].tolist()
        [2, 1, 3]
        """
        topology = placement.topology
        if not is_whole(rank) or not 0 <= rank < topology.num_ranks:
            raise InvalidPlacementError(
                f"PlacementTables: rank must be 0..{topology.num_ranks - 1}, as the "
                f"placement has {amount(topology.num_ranks, 'rank')}, got {rank!r}"
            )
        width = placement.slots_per_rank
        candidates, num_candidates = _candidates(placement, rank)
        return cls(
            rank=int(rank),
            candidates=candidates,
            num_candidates=num_candidates,
            local_experts=placement.slot_experts[:, rank * width :][:, :width].copy(),
            layer_ids=placement.layer_ids,
            num_experts=placement.num_experts,
            num_ranks=topology.num_ranks,
            ranks_per_node=topology.ranks_per_node,
            slots_per_rank=width,
            fingerprint=fingerprint(placement),
        )

    def row_of(self, layer: int) -> int:
        """Row of the tables that holds the model's layer of that number.

        Raises
        ------
        InvalidPlacementError
            When the placement does not know the layer.
        """
        found = np.flatnonzero(self.layer_ids == layer)
        if not found.size:
            raise InvalidPlacementError(
                f"PlacementTables: the placement is for another model: it has layers "
                f"{self.layer_ids.tolist()}, wanted layer {layer}"
            )
        return int(found[0])


def fingerprint(placement: Placement) -> str:
    """SHA-256 of what decides where tokens go: slots, layers, experts, ranks, nodes."""
    topology = placement.topology
    sizes = (placement.num_experts, topology.num_ranks, topology.ranks_per_node)
    digest = hashlib.sha256(f"{sizes} {placement.slot_experts.shape}".encode())
    digest.update(placement.layer_ids.astype("<i4").tobytes())
    digest.update(placement.slot_experts.astype("<i4").tobytes())
    return digest.hexdigest()


def _candidates(
    placement: Placement, rank: int
) -> tuple[NDArray[np.int32], NDArray[np.int32]]:
    """[L, E, R] and [L, E]: of each expert's slots, those nearest to `rank`."""
    num_layers, num_experts = placement.num_layers, placement.num_experts
    slots = placement.slot_experts
    nodes = placement.topology.nodes()
    rank_of_slot = np.arange(placement.num_slots) // placement.slots_per_rank
    nearness = (nodes[rank_of_slot] == nodes[rank]) + (rank_of_slot == rank).astype(int)

    layer, slot = np.nonzero(slots >= 0)
    owner = layer * num_experts + slots[layer, slot]
    best = np.zeros(num_layers * num_experts, np.int64)
    np.maximum.at(best, owner, nearness[slot])
    most = int(np.bincount(owner).max())

    nearest = nearness[slot] == best[owner]
    owner, slot = owner[nearest], slot[nearest]
    order = np.argsort(owner, kind="stable")  # by expert, then in slot order
    count = np.bincount(owner, minlength=num_layers * num_experts)
    place = np.arange(len(owner)) - np.repeat(np.cumsum(count) - count, count)
    table = np.full((num_layers * num_experts, most), ABSENT, np.int32)
    table[owner[order], place] = slot[order]
    shape = (num_layers, num_experts)
    return table.reshape(*shape, most), count.reshape(shape).astype(np.int32)
