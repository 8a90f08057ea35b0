"""Which expert sits in which slot, layer by layer.

Legend: L layers, E experts, G ranks, S slots per rank and layer, P = G * S slots.
Slot p lives on rank ``p // S``; every rank has the same number of slots.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from moetuner._checks import is_array, is_whole, kind_of
from moetuner._words import amount
from moetuner.errors import InvalidPlacementError, InvalidProblemError

if TYPE_CHECKING:
    from collections.abc import Mapping

    from numpy.typing import NDArray

    from moetuner.placement.topology import Topology

EMPTY = -1


@dataclass(frozen=True, kw_only=True, slots=True)
class ProgressPoint:
    """Where a solver's stage stood after so many seconds of the solve."""

    stage: str
    seconds: float
    incumbent: float | None = None
    bound: float | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class Provenance:
    """How a placement came about: what its solver claims, and from what."""

    model: str = ""
    solver: str = ""
    objective: str = ""
    value: float | None = None
    lower_bound: float | None = None
    status: str = ""
    seconds: float | None = None
    trace_sha256: str = ""
    other_traces: tuple[str, ...] = ()
    """SHA-256 of every other trace that the plan is for."""
    options: Mapping[str, Any] = field(default_factory=dict)
    """All that was asked for, as plain values.

    `moetuner.planning.provenance.options_of` makes `PlanOptions` of them again."""
    versions: Mapping[str, str] = field(default_factory=dict)
    """Of the packages that decide what comes out."""
    validation: Mapping[str, Any] = field(default_factory=dict)
    """Of a plan of all tokens: what the same options did on tokens that were held out,
    see `moetuner.planning.refit.validation_of`."""
    progress: tuple[ProgressPoint, ...] = ()
    """How incumbent and bound came together, in the order of time."""


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Placement:
    """A legal slot map; validated once, here.

    Parameters
    ----------
    slot_experts
        int32 [L, P], logical expert of each physical slot; -1 is an empty slot
        (cluster sizes may differ). An expert in several slots is replicated.
    layer_ids
        int32 [L], the model's own layer numbers.
    num_experts
        Logical experts E; each has at least one slot in every layer.
    topology
        Ranks and nodes; the number of ranks divides P.
    provenance
        Solver, claims, source.

    Raises
    ------
    InvalidPlacementError
        Naming the layer and the rule that is broken.
    """

    slot_experts: NDArray[np.int32]
    layer_ids: NDArray[np.int32]
    num_experts: int
    topology: Topology
    provenance: Provenance = field(default_factory=Provenance)

    def __post_init__(self) -> None:
        slots = self.slot_experts
        if not is_array(slots, np.int32, 2) or 0 in slots.shape:
            raise InvalidPlacementError(
                f"Placement: slot_experts must be int32 [layers, slots], got "
                f"{kind_of(slots)}"
            )
        if slots.shape[1] % self.topology.num_ranks:
            raise InvalidPlacementError(
                f"Placement: {amount(slots.shape[1], 'slot')} cannot be shared equally "
                f"by {amount(self.topology.num_ranks, 'rank')}"
            )
        layers = self.layer_ids
        if not is_array(layers, np.int32, 1) or layers.shape != slots.shape[:1]:
            raise InvalidPlacementError(
                f"Placement: layer_ids must be int32 [{slots.shape[0]}], got "
                f"{kind_of(layers)}"
            )
        if (np.diff(layers) <= 0).any():
            raise InvalidPlacementError(
                f"Placement: layer_ids must be strictly increasing, got "
                f"{layers.tolist()}"
            )
        if layers[0] < 0:
            raise InvalidPlacementError(
                f"Placement: layer_ids must not be negative, got {layers.tolist()}"
            )
        if not is_whole(self.num_experts) or self.num_experts < 1:
            raise InvalidPlacementError(
                f"Placement: num_experts must be positive, got {self.num_experts!r}"
            )
        for layer, row in zip(layers.tolist(), slots, strict=True):
            _check_layer(layer, row, self.num_experts, self.topology)
        for name in ("slot_experts", "layer_ids"):
            own = np.array(getattr(self, name), order="C")
            own.flags.writeable = False
            object.__setattr__(self, name, own)

    @classmethod
    def from_rank_of(
        cls,
        rank_of: NDArray[np.integer[Any]],
        *,
        layer_ids: NDArray[np.int32],
        topology: Topology,
        slots_per_rank: int | None = None,
        provenance: Provenance | None = None,
    ) -> Placement:
        """Build a placement from the rank of each expert, [L, E].

        Experts of a rank fill its slots in order of their ids; slots that stay over
        are empty. ``slots_per_rank`` defaults to the largest count in any layer.
        """
        if rank_of.ndim != 2 or not rank_of.size:
            raise InvalidPlacementError(
                f"from_rank_of: rank_of must be [layers, experts], got "
                f"{list(rank_of.shape)}"
            )
        if rank_of.dtype.kind not in "iu":
            raise InvalidPlacementError(
                f"from_rank_of: rank_of must be integers, got {kind_of(rank_of)}"
            )
        num_layers, num_experts = rank_of.shape
        if layer_ids.shape != (num_layers,):
            raise InvalidPlacementError(
                f"from_rank_of: layer_ids must be [{num_layers}], one per row of "
                f"rank_of, got {list(layer_ids.shape)}"
            )
        num_ranks = topology.num_ranks
        if rank_of.min() < 0 or rank_of.max() >= num_ranks:
            raise InvalidPlacementError(
                f"from_rank_of: ranks must be 0..{num_ranks - 1}, got "
                f"{rank_of.min()}..{rank_of.max()}"
            )
        sizes = np.stack([np.bincount(row, minlength=num_ranks) for row in rank_of])
        width = int(sizes.max()) if slots_per_rank is None else slots_per_rank
        if sizes.max() > width:
            layer = int(sizes.max(axis=1).argmax())
            raise InvalidPlacementError(
                f"from_rank_of: a rank holds {amount(sizes.max(), 'expert')} at layer "
                f"{layer_ids[layer]}, but has {amount(width, 'slot')}"
            )
        slots = np.full((num_layers, num_ranks * width), EMPTY, np.int32)
        for row, ranks, size in zip(slots, rank_of, sizes, strict=True):
            experts = np.argsort(ranks, kind="stable")
            offsets = np.arange(num_experts) - np.repeat(np.cumsum(size) - size, size)
            row[ranks[experts] * width + offsets] = experts
        return cls(
            slot_experts=slots,
            layer_ids=layer_ids,
            num_experts=num_experts,
            topology=topology,
            provenance=provenance or Provenance(),
        )

    @property
    def num_layers(self) -> int:
        """Number of MoE layers L."""
        return int(self.slot_experts.shape[0])

    @property
    def num_slots(self) -> int:
        """Physical slots per layer P, over all ranks."""
        return int(self.slot_experts.shape[1])

    @property
    def slots_per_rank(self) -> int:
        """Slots per rank and layer S."""
        return self.num_slots // self.topology.num_ranks

    @property
    def has_replicas(self) -> bool:
        """Whether any expert has more than one slot in a layer."""
        filled = (self.slot_experts != EMPTY).sum(axis=1)
        return bool((filled > self.num_experts).any())

    def num_replicas(self) -> NDArray[np.int64]:
        """Slots of each expert, int64 [L, E]; at least 1."""
        return np.stack(
            [
                np.bincount(row[row != EMPTY], minlength=self.num_experts)
                for row in self.slot_experts
            ]
        )

    def sha256(self) -> str:
        """Hash of what sits where (slots, layers, experts, topology), hexadecimal.

        Equal for the same placement, however it came about.
        """
        topology = self.topology
        sizes = (self.num_experts, topology.num_ranks, topology.ranks_per_node)
        digest = hashlib.sha256(f"{sizes} {self.slot_experts.shape}".encode())
        digest.update(self.layer_ids.astype("<i4").tobytes())
        digest.update(self.slot_experts.astype("<i4").tobytes())
        return digest.hexdigest()

    def rank_sizes(self) -> NDArray[np.int64]:
        """Filled slots of each rank, int64 [L, G]."""
        shape = (self.num_layers, self.topology.num_ranks, self.slots_per_rank)
        filled: NDArray[np.int64] = (self.slot_experts.reshape(shape) != EMPTY).sum(2)
        return filled

    def rank_of(self) -> NDArray[np.int32]:
        """Rank of each expert, int32 [L, E]; refuses replicas."""
        if self.has_replicas:
            raise InvalidPlacementError(
                "rank_of: an expert with replicas has no single rank; use slot_experts"
            )
        ranks = np.empty((self.num_layers, self.num_experts), np.int32)
        layer, slot = np.nonzero(self.slot_experts != EMPTY)
        ranks[layer, self.slot_experts[layer, slot]] = slot // self.slots_per_rank
        return ranks


def contiguous_rank_of(num_layers: int, num_experts: int, num_ranks: int) -> Any:
    """Rank of each expert when blocks of neighbours share a rank, int32 [L, E].

    Ranks that cannot be filled equally get one expert fewer, the last ones.
    """
    if num_experts < num_ranks:
        raise InvalidProblemError(
            f"contiguous: {amount(num_experts, 'expert')} cannot cover "
            f"{amount(num_ranks, 'rank')}"
        )
    base, extra = divmod(num_experts, num_ranks)
    sizes = base + (np.arange(num_ranks) < extra)
    row = np.repeat(np.arange(num_ranks, dtype=np.int32), sizes)
    return np.tile(row, (num_layers, 1))


def _check_layer(
    layer: int, row: NDArray[np.int32], num_experts: int, topology: Topology
) -> None:
    if row.min() < EMPTY or row.max() >= num_experts:
        bad = row[(row < EMPTY) | (row >= num_experts)][0]
        raise InvalidPlacementError(
            f"Placement: layer {layer} holds expert {bad}, outside 0.."
            f"{num_experts - 1} (-1 is an empty slot)"
        )
    slots_of = np.bincount(row[row != EMPTY], minlength=num_experts)
    if (slots_of == 0).any():
        missing = np.flatnonzero(slots_of == 0).tolist()
        raise InvalidPlacementError(
            f"Placement: layer {layer} has no slot for experts {missing[:8]}"
        )
    by_rank = np.sort(row.reshape(topology.num_ranks, -1), axis=1)
    twice = (by_rank[:, 1:] == by_rank[:, :-1]) & (by_rank[:, 1:] != EMPTY)
    if twice.any():
        rank, place = np.argwhere(twice)[0]
        raise InvalidPlacementError(
            f"Placement: rank {rank} holds expert {by_rank[rank, place]} twice at "
            f"layer {layer}"
        )
