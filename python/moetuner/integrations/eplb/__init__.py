"""A drop-in for EPLB: `rebalance_experts` with the published signature and return.

Engines and scripts that call ``eplb.rebalance_experts`` (github.com/deepseek-ai/EPLB)
import it from here instead. Every layer starts from what the published greedy gives and
is improved from there, so it is never less balanced. Told the map in use, it moves as
few experts as that balance takes. torch is needed only where tensors are given.

Legend: L layers, E experts, P slots (physical experts), G ranks, N nodes.
"""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from moetuner._checks import is_whole
from moetuner.errors import InvalidProblemError
from moetuner.integrations.eplb.moves import with_few_moves
from moetuner.integrations.eplb.packing import Shape, balanced_slots

if TYPE_CHECKING:
    from numpy.typing import NDArray

__all__ = ["EplbPolicy", "Rebalanced", "rebalance_experts"]


class Rebalanced(NamedTuple):
    """What EPLB returns, in its order; torch tensors where `weight` was one.

    Parameters
    ----------
    physical_to_logical_map
        int64 [L, P], the expert in each slot.
    logical_to_physical_map
        int64 [L, E, X], the slots of each expert in rising order; -1 is none.
    expert_count
        int64 [L, E], replicas of each expert.
    """

    physical_to_logical_map: Any
    logical_to_physical_map: Any
    expert_count: Any


def rebalance_experts(
    weight: Any,
    num_replicas: int,
    num_groups: int,
    num_nodes: int,
    num_gpus: int,
    old_global_expert_indices: Any = None,
) -> Rebalanced:
    """Replicate and pack experts so that ranks get even loads.

    Parameters
    ----------
    weight
        Load of each expert [L, E], a torch tensor or anything that NumPy takes as one.
    num_replicas
        Slots P in all, a multiple of `num_gpus`, at least E.
    num_groups
        Groups of experts that stay on one node; where they are no multiple of the
        nodes, all ranks count as one node, as published.
    num_nodes, num_gpus
        Nodes N, and ranks G, a multiple of them.
    old_global_expert_indices
        The map in use, integers [L, P]; None where there is none. A layer whose map is
        as balanced as the new one keeps it; others get theirs in an order in which few
        experts move.

    Raises
    ------
    InvalidProblemError
        When the numbers do not fit each other, or a load is below 0 or not finite.
    """
    load = _loads(weight)
    shape = _shape(load, num_replicas, num_groups, num_nodes, num_gpus)
    slots = balanced_slots(load, shape)
    if old_global_expert_indices is not None:
        old = _map_in_use(old_global_expert_indices, slots.shape, load.shape[1])
        slots = with_few_moves(slots, old, load, shape)
    count = np.stack([np.bincount(row, minlength=load.shape[1]) for row in slots])
    tables = slots, _slots_of_experts(slots, count), count.astype(np.int64)
    if not _is_tensor(weight):
        return Rebalanced(*tables)
    torch = sys.modules["torch"]
    return Rebalanced(*(torch.from_numpy(table) for table in tables))


class EplbPolicy:
    """`rebalance_experts` as a class, for engines that load a policy by name.

    It has the method of vLLM's ``AbstractEplbPolicy``, which wants the map alone.
    """

    @classmethod
    def rebalance_experts(
        cls,
        weight: Any,
        num_replicas: int,
        num_groups: int,
        num_nodes: int,
        num_ranks: int,
        old_global_expert_indices: Any = None,
    ) -> Any:
        """The expert in each slot, int64 [L, P]; see `rebalance_experts`."""
        return rebalance_experts(
            weight,
            num_replicas,
            num_groups,
            num_nodes,
            num_ranks,
            old_global_expert_indices,
        ).physical_to_logical_map


def _is_tensor(value: Any) -> bool:
    torch = sys.modules.get("torch")
    return torch is not None and isinstance(value, torch.Tensor)


def _array(value: Any) -> NDArray[Any]:
    if _is_tensor(value):
        if value.is_meta:
            raise InvalidProblemError(
                "rebalance_experts: weight and maps must hold numbers, got a tensor on "
                "the meta device"
            )
        value = value.detach().cpu()
        return np.asarray(value.double() if value.is_floating_point() else value)
    return np.asarray(value)


def _loads(weight: Any) -> NDArray[np.float64]:
    load = _array(weight)
    if load.ndim != 2 or not load.size or load.dtype.kind not in "iufb":
        raise InvalidProblemError(
            f"rebalance_experts: weight must be numbers [layers, experts], got "
            f"{load.dtype} {list(load.shape)}"
        )
    load = load.astype(np.float64)
    if not np.isfinite(load).all() or load.min() < 0:
        raise InvalidProblemError(
            "rebalance_experts: weight must be finite and >= 0 everywhere"
        )
    return load


def _shape(
    load: NDArray[np.float64],
    num_replicas: int,
    num_groups: int,
    num_nodes: int,
    num_gpus: int,
) -> Shape:
    given = {
        "num_replicas": num_replicas,
        "num_groups": num_groups,
        "num_nodes": num_nodes,
        "num_gpus": num_gpus,
    }
    for name, value in given.items():
        if not is_whole(value) or value < 1:
            raise InvalidProblemError(
                f"rebalance_experts: {name} must be >= 1 and whole, got {value!r}"
            )
    num_experts = load.shape[1]
    if num_replicas < num_experts:
        raise InvalidProblemError(
            f"rebalance_experts: num_replicas must be >= {num_experts}, the number of "
            f"experts, got {num_replicas}"
        )
    if num_groups % num_nodes:  # as published: neither of them counts then
        num_groups = num_nodes = 1
    for whole, part, name in (
        (num_replicas, num_gpus, "num_replicas must be a multiple of num_gpus"),
        (num_gpus, num_nodes, "num_gpus must be a multiple of num_nodes"),
        (num_experts, num_groups, "experts must be a multiple of num_groups"),
    ):
        if whole % part:
            raise InvalidProblemError(
                f"rebalance_experts: {name}, got {whole} and {part}"
            )
    return Shape(
        num_slots=num_replicas,
        num_groups=num_groups,
        num_nodes=num_nodes,
        num_ranks=num_gpus,
    )


def _map_in_use(
    value: Any, shape: tuple[int, ...], num_experts: int
) -> NDArray[np.int64]:
    old = _array(value)
    if old.shape != shape or old.dtype.kind not in "iu":
        raise InvalidProblemError(
            f"rebalance_experts: old_global_expert_indices must be integers "
            f"{list(shape)}, got {old.dtype} {list(old.shape)}"
        )
    if old.min() < -1 or old.max() >= num_experts:
        raise InvalidProblemError(
            f"rebalance_experts: old_global_expert_indices must be "
            f"-1..{num_experts - 1}"
        )
    return old.astype(np.int64)


def _slots_of_experts(
    slots: NDArray[np.int64], count: NDArray[np.int64]
) -> NDArray[np.int64]:
    """Slots of each expert in rising order, padded with -1."""
    table = np.full((*count.shape, int(count.max())), -1, np.int64)
    order = np.argsort(slots, axis=1, kind="stable")
    experts = np.take_along_axis(slots, order, axis=1)
    starts = np.cumsum(count, axis=1) - count
    place = np.arange(slots.shape[1]) - np.take_along_axis(starts, experts, axis=1)
    table[np.arange(len(slots))[:, None], experts, place] = order
    return table
