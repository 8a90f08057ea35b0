"""Spare slots filled with replicas: engines know no empty ones.

Legend: L MoE layers, E experts, G ranks, S slots of a rank.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from moetuner._checks import kind_of
from moetuner.errors import InvalidPlacementError
from moetuner.placement.model import EMPTY

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from moetuner.placement.model import Placement


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class FilledSlots:
    """A slot map without empty slots.

    Parameters
    ----------
    slots
        int32 [L, P], expert of each slot.
    num_added
        Slots that were empty, over all layers.
    """

    slots: NDArray[np.int32]
    num_added: int


def fill_slots(
    placement: Placement, *, load: NDArray[Any] | None = None, repeats: bool = True
) -> FilledSlots:
    """Fill empty slots with replicas.

    Parameters
    ----------
    placement
        The plan.
    load
        Integers or floats [L, E], tokens per expert: the busiest per copy is replicated
        first. None takes the one with the fewest copies, then the first.
    repeats
        Whether a rank may hold an expert twice. Then a spare slot repeats an expert of
        its own rank, one without copies elsewhere if there is one: that sends no token
        anywhere else than the plan does. Otherwise it takes an expert of another rank,
        and with it a share of its tokens.

    Raises
    ------
    InvalidPlacementError
        When `load` has another shape, or is not finite and >= 0.
    """
    shape = (placement.num_layers, placement.num_experts)
    weights = np.ones(shape)
    if load is not None:
        if load.shape != shape or load.dtype.kind not in "iuf":
            raise InvalidPlacementError(
                f"fill_slots: load must be numbers {list(shape)}, got {kind_of(load)}"
            )
        weights = load.astype(np.float64)
        if not np.isfinite(weights).all() or (weights < 0).any():
            raise InvalidPlacementError("fill_slots: load must be finite and >= 0")
    slots = np.array(placement.slot_experts)
    num_ranks = placement.topology.num_ranks
    for row, weight in zip(slots, weights, strict=True):
        copies = np.bincount(row[row != EMPTY], minlength=placement.num_experts)
        for held in row.reshape(num_ranks, -1):
            _fill_rank(held, copies, weight, repeats)
    return FilledSlots(
        slots=slots, num_added=int((placement.slot_experts == EMPTY).sum())
    )


def _fill_rank(
    held: NDArray[np.int32],
    copies: NDArray[np.int64],
    weight: NDArray[np.float64],
    repeats: bool,
) -> None:
    """Fill one rank's slots in place; `copies` counts on."""
    for slot in np.flatnonzero(held == EMPTY):
        own = np.unique(held[held != EMPTY])
        if repeats and own.size:
            here = np.bincount(held[held != EMPTY], minlength=len(copies))
            alone = own[here[own] == copies[own]]
            # A further copy of what other ranks hold too would draw tokens from them.
            legal = alone if alone.size else own
        else:
            legal = np.setdiff1d(np.arange(len(copies)), own)
        if not legal.size:
            raise InvalidPlacementError(
                f"fill_slots: a rank of {len(held)} slots for {len(copies)} experts "
                f"would hold one twice"
            )
        per_copy = weight[legal] / copies[legal]
        expert = legal[np.argmax(per_copy)]
        held[slot] = expert
        copies[expert] += 1
