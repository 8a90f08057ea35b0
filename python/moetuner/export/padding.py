"""Spare slots filled with replicas: engines know no empty ones.

The rule: a spare slot takes the *coldest* expert that its rank lacks. Engines send a
share of an expert's tokens to each replica, and a rank reads the weights of every
expert that has a token: rare for an expert that few tokens choose, and in decode
nothing else costs as much. The coldest expert of the rank's own, twice, would be read
more often: it is warmer than the coldest of all.

Where loads are unknown, the coldest is too, and any other expert may be a busy one. A
spare slot then repeats an expert of its own rank that has no replica elsewhere: no
token goes anywhere else. vllm-ascend cannot hold an expert twice on a device; there it
takes one of those with the fewest replicas.

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
        Integers or floats [L, E], tokens per expert; None where they are unknown.
    repeats
        Whether a rank may hold an expert twice, where loads are unknown or it holds
        all of them.

    Raises
    ------
    InvalidPlacementError
        When `load` has another shape, or is not finite and >= 0.
    """
    shape = (placement.num_layers, placement.num_experts)
    weights: list[NDArray[np.float64] | None] = [None] * placement.num_layers
    if load is not None:
        if load.shape != shape or load.dtype.kind not in "iuf":
            raise InvalidPlacementError(
                f"fill_slots: load must be numbers {list(shape)}, got {kind_of(load)}"
            )
        if not np.isfinite(load).all() or (load < 0).any():
            raise InvalidPlacementError("fill_slots: load must be finite and >= 0")
        weights = list(load.astype(np.float64))
    slots = np.array(placement.slot_experts)
    num_ranks = placement.topology.num_ranks
    for row, weight in zip(slots, weights, strict=True):
        replicas = np.bincount(row[row != EMPTY], minlength=placement.num_experts)
        for held in row.reshape(num_ranks, -1):
            _fill_rank(held, replicas, weight, repeats)
    return FilledSlots(
        slots=slots, num_added=int((placement.slot_experts == EMPTY).sum())
    )


def _fill_rank(
    held: NDArray[np.int32],
    replicas: NDArray[np.int64],
    weight: NDArray[np.float64] | None,
    repeats: bool,
) -> None:
    """Fill one rank's slots in place; `replicas` counts on."""
    for slot in np.flatnonzero(held == EMPTY):
        own = np.unique(held[held != EMPTY])
        lacking = np.setdiff1d(np.arange(len(replicas)), own)
        if weight is not None and lacking.size:
            expert = lacking[np.argmin(weight[lacking])]
        elif repeats and own.size:
            here = np.bincount(held[held != EMPTY], minlength=len(replicas))
            alone = own[here[own] == replicas[own]]
            # A further replica of what other ranks hold too would draw tokens from
            # them.
            legal = alone if alone.size else own
            expert = legal[0 if weight is None else np.argmin(weight[legal])]
        elif lacking.size:
            expert = lacking[np.argmin(replicas[lacking])]
        else:
            raise InvalidPlacementError(
                f"fill_slots: a rank of {len(held)} slots for {len(replicas)} experts "
                f"would hold one twice"
            )
        held[slot] = expert
        replicas[expert] += 1
