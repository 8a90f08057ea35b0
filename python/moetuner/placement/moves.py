"""From one placement to another: which experts move, in an order that memory allows.

Legend: L layers, E experts, G ranks, S slots per rank and layer. A copy is an expert of
one layer on one rank.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np

from moetuner.errors import InvalidPlacementError
from moetuner.placement.model import EMPTY

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from moetuner.placement.model import Placement
    from moetuner.placement.topology import Topology


@dataclass(frozen=True, kw_only=True, slots=True)
class Move:
    """One step: `target` gets `expert` of `layer` from `source`.

    `source` gives its copy up, unless it is ``kept``. The copy goes into a free slot,
    or into that of ``replaced``, an expert which has another copy, or of ``exchanged``,
    which goes to `source` in the same step. At most one of the two is not None.
    """

    layer: int
    expert: int
    source: int
    target: int
    exchanged: int | None = None
    kept: bool = False
    replaced: int | None = None


def moves_between(old: Placement, new: Placement) -> tuple[Move, ...]:
    """Steps from `old` to `new`; no rank ever holds more copies than it has slots.

    Copies go into free slots where there are some, else over copies that `new` does
    not want and whose expert has another one; where neither is left two experts change
    places, so that a ring of k moves takes k - 1 steps. No expert is ever without a
    copy. Copies that `new` does not want and that were never in the way are there at
    the end: to drop them costs nothing.

    Raises
    ------
    InvalidPlacementError
        When the placements are of different models or ranks.
    """
    shapes = [(p.num_experts, p.topology, p.layer_ids.tolist()) for p in (old, new)]
    if shapes[0] != shapes[1]:
        raise InvalidPlacementError(
            f"moves_between: wanted two placements of one model on the same ranks, got "
            f"(experts, topology, layers) {shapes[0]} and {shapes[1]}"
        )
    slots = max(old.slots_per_rank, new.slots_per_rank)
    steps: list[Move] = []
    for row, layer in enumerate(old.layer_ids.tolist()):
        on_way = _OnWay(
            layer=layer,
            slots=slots,
            topology=old.topology,
            holders=_holders(old, row),
            wanted=_holders(new, row),
        )
        steps += on_way.all_steps()
    return tuple(steps)


def copies_of(placement: Placement) -> NDArray[np.int64]:
    """Each copy as one number, int64 [copies]: (layer * E + expert) * G + rank."""
    layer, slot = np.nonzero(placement.slot_experts != EMPTY)
    expert = placement.slot_experts[layer, slot].astype(np.int64)
    place = layer * placement.num_experts + expert
    copies: NDArray[np.int64] = place * placement.topology.num_ranks
    return copies + slot // placement.slots_per_rank


def fetched_copies(old: Placement, new: Placement) -> NDArray[np.int64]:
    """Copies of `new` that their rank does not hold in `old`, as `copies_of` has them.

    Both are of the same model and machine.
    """
    return np.setdiff1d(copies_of(new), copies_of(old), assume_unique=True)


def _holders(placement: Placement, row: int) -> list[set[int]]:
    """Ranks that hold each expert of a layer."""
    holders: list[set[int]] = [set() for _ in range(placement.num_experts)]
    for slot, expert in enumerate(placement.slot_experts[row].tolist()):
        if expert != EMPTY:
            holders[expert].add(slot // placement.slots_per_rank)
    return holders


@dataclass(kw_only=True)
class _OnWay:
    """One layer between two placements: the ranks of each expert, now and wanted."""

    layer: int
    slots: int
    topology: Topology
    holders: list[set[int]]
    wanted: list[set[int]]
    held: list[set[int]] = field(init=False)
    """Experts on each rank now."""
    steps: list[Move] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.held = [set() for _ in range(self.topology.num_ranks)]
        for expert, ranks in enumerate(self.holders):
            for rank in ranks:
                self.held[rank].add(expert)

    def all_steps(self) -> list[Move]:
        """First every expert to one of its ranks, then its other copies.

        When each is where it is wanted, all else can be overwritten: a rank that wants
        one more copy has a free slot, or holds one that it does not want.
        """
        while away := self._away():
            written = [self._write(expert) for expert in away]
            if not any(written):
                self._exchange_until_free(away)
        for expert, ranks in enumerate(self.wanted):
            for target in sorted(ranks - self.holders[expert]):
                self._copy(expert, target, self._overwritable(target))
        return self.steps

    def _away(self) -> list[int]:
        """Experts without a copy where they are wanted."""
        pairs = zip(self.holders, self.wanted, strict=True)
        return [e for e, (here, there) in enumerate(pairs) if not here & there]

    def _overwritable(self, rank: int) -> int | None:
        """An expert whose copy on `rank` is not wanted, and not its only one."""
        found = (
            e
            for e in self.held[rank]
            if len(self.holders[e]) > 1 and rank not in self.wanted[e]
        )
        return min(found, default=None)

    def _write(self, expert: int) -> bool:
        """Copy to a wanted rank that has a free slot, or else one to overwrite."""
        full = []
        for target in sorted(self.wanted[expert]):
            if len(self.held[target]) < self.slots:
                self._copy(expert, target, None)
                return True
            full.append(target)
        for target in full:
            other = self._overwritable(target)
            if other is not None:
                self._copy(expert, target, other)
                return True
        return False

    def _copy(self, expert: int, target: int, other: int | None) -> None:
        """Into a free slot where there is one, else over `other`."""
        source = self._source(expert, target)
        replaced = None
        if len(self.held[target]) >= self.slots:
            assert other is not None
            replaced = other
            self._drop(other, target)
        kept = source in self.wanted[expert]
        if not kept:
            self._drop(expert, source)
        self._hold(expert, target)
        self.steps.append(
            Move(
                layer=self.layer,
                expert=expert,
                source=source,
                target=target,
                kept=kept,
                replaced=replaced,
            )
        )

    def _source(self, expert: int, target: int) -> int:
        """Who gives `expert`: best in the node of `target`, and not wanted there."""
        size = self.topology.ranks_per_node
        return min(
            self.holders[expert],
            key=lambda rank: (
                rank // size != target // size,
                rank in self.wanted[expert],
                rank,
            ),
        )

    def _exchange_until_free(self, away: list[int]) -> None:
        """Exchange experts that are away until one has copies to overwrite."""
        for expert in away:
            if self.holders[expert] & self.wanted[expert]:
                continue  # it went the other way
            self._exchange(expert)
            if len(self.holders[expert]) > 1:
                return

    def _exchange(self, expert: int) -> None:
        """Change places with one that is not wanted where this one is."""
        source = min(self.holders[expert])
        found = [
            (source not in self.wanted[other], target, other)
            for target in self.wanted[expert]
            for other in self.held[target]
            if target not in self.wanted[other]
        ]
        _, target, other = min(found)
        for moved, here, there in ((expert, source, target), (other, target, source)):
            self._drop(moved, here)
            self._hold(moved, there)
        self.steps.append(
            Move(
                layer=self.layer,
                expert=expert,
                source=source,
                target=target,
                exchanged=other,
            )
        )

    def _hold(self, expert: int, rank: int) -> None:
        self.holders[expert].add(rank)
        self.held[rank].add(expert)

    def _drop(self, expert: int, rank: int) -> None:
        self.holders[expert].discard(rank)
        self.held[rank].discard(expert)
