"""Spare slots filled with replicas: engines know no empty ones.

The rule: a spare slot repeats the *coldest* expert of its own rank that has no replica
elsewhere. It computes nothing more, so it should cost nothing: engines that spread
tokens over all replicas (vLLM by a hash) read the weights of both in decode, which is
rare for an expert that few tokens choose, and happens in every step for the busiest.

vllm-ascend cannot hold an expert twice on a device. There a spare slot takes the
busiest expert (per replica) of another rank, and with it a share of its tokens.

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
        Integers or floats [L, E], tokens per expert. None takes the first expert that
        may be taken, of those with the fewest replicas.
    repeats
        Whether a rank may hold an expert twice: see above. One without replicas
        elsewhere sends no token anywhere else than the plan does; where a rank has
        none, its coldest gets a larger share of its tokens there.

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
        if repeats and own.size:
            expert = legal[np.argmin(weight[legal])]
        else:
            expert = legal[np.argmax(weight[legal] / copies[legal])]
        held[slot] = expert
        copies[expert] += 1
