"""DeepEP 2.5's ``redundancy_mapping``: whose weights each rank's replicas take.

Every rank has E / G master experts in its first slots and R replica slots behind them.
Masters are counted through the NVLink domain (a node): rank of the domain, then place
on the rank. ``redundancy_mapping`` int32 [ranks, R] names the master of each replica
slot by that number; -1 is an unused slot, and no rank replicates an expert of its own.

The file is safetensors: ``redundancy_mapping`` int32 [L, G, R], rows of a node's ranks
behind one another, and ``master_experts`` int32 [L, E], the expert of each master.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
from safetensors.numpy import save

from moetuner.errors import InvalidPlacementError
from moetuner.export.base import ExportOptions, Written
from moetuner.export.rows import complete
from moetuner.placement.model import EMPTY

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from moetuner.placement.model import Placement


def write_deepep(placement: Placement, options: ExportOptions) -> Written:
    """Masters and replicas of every layer."""
    num_ranks, num_experts = placement.topology.num_ranks, placement.num_experts
    if num_experts % num_ranks:
        raise InvalidPlacementError(
            f"export to deepep: {num_experts} experts are no equal shares of "
            f"{num_ranks} ranks"
        )
    completed = complete(placement, options, "deepep", repeats=False)
    plan = completed.placement
    num_masters = num_experts // num_ranks
    num_replicas = plan.slots_per_rank - num_masters
    held = plan.slot_experts.reshape(plan.num_layers, num_ranks, -1)
    masters = np.empty((plan.num_layers, num_ranks, num_masters), np.int32)
    mapping = np.full((plan.num_layers, num_ranks, num_replicas), -1, np.int32)
    for layer, row in enumerate(held):
        number = int(plan.layer_ids[layer])
        masters[layer] = _masters(row, num_experts, num_masters, number)
        _fill(mapping[layer], row, masters[layer], plan.topology.ranks_per_node, number)
    tensors = {
        "redundancy_mapping": mapping,
        "master_experts": masters.reshape(plan.num_layers, -1),
    }
    return Written(
        data=save(tensors),
        command=(
            "from safetensors.torch import load_file; mapping = "
            'load_file("{string}")["redundancy_mapping"]  # [layer] of it, and the '
            "ranks of the node, to EPBuffer.lb_prefetch_weights"
        ),
        notes=(
            *completed.notes,
            "weights of the masters must lie as master_experts has them, before "
            "replicas are taken from them",
            "slots without a replica stay unused (-1): nothing is filled up",
        ),
        fills=False,
    )


def _masters(
    held_GS: NDArray[np.int32], num_experts: int, num_masters: int, layer: int
) -> NDArray[np.int32]:
    """One master place for each expert, equally many on each rank: int32 [G, M]."""
    from scipy.optimize import linear_sum_assignment  # not with every command

    num_ranks = len(held_GS)
    there = np.zeros((num_experts, num_ranks), bool)
    for rank, row in enumerate(held_GS):
        there[row[row != EMPTY], rank] = True
    # Each rank offers as many places as it must have masters.
    cost = np.repeat(~there, num_masters, axis=1)
    experts, places = linear_sum_assignment(cost)
    if cost[experts, places].any():
        raise InvalidPlacementError(
            f"export to deepep: at layer {layer} no choice of masters gives every rank "
            f"{num_masters} experts of those that it holds: plan with as many slots on "
            f"each rank"
        )
    owner = places // num_masters
    order = np.lexsort((experts, owner))
    return experts[order].astype(np.int32).reshape(num_ranks, num_masters)


def _fill(
    mapping_GR: NDArray[np.int32],
    held_GS: NDArray[np.int32],
    masters_GM: NDArray[np.int32],
    ranks_per_node: int,
    layer: int,
) -> None:
    """The master of each replica, by its number in the node."""
    num_masters = masters_GM.shape[1]
    place = {int(e): n for n, e in enumerate(masters_GM.ravel().tolist())}
    for rank, row in enumerate(held_GS):
        own = set(masters_GM[rank].tolist())
        replicas = [e for e in row.tolist() if e != EMPTY and e not in own]
        for slot, expert in enumerate(replicas):
            owner, inner = divmod(place[expert], num_masters)
            if owner // ranks_per_node != rank // ranks_per_node:
                raise InvalidPlacementError(
                    f"export to deepep: at layer {layer} rank {rank} replicates expert "
                    f"{expert}, whose master is on another node: DeepEP takes weights "
                    f"over NVLink only"
                )
            mapping_GR[rank, slot] = owner % ranks_per_node * num_masters + inner
