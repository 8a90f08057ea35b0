"""Whether all ranks of a group mean the same placement, and one that fits."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch.distributed as dist

from moetuner.errors import InvalidPlacementError
from moetuner.placement.tables import fingerprint

if TYPE_CHECKING:
    from moetuner.placement.model import Placement


def misfit(
    placement: Placement,
    group: dist.ProcessGroup,
    num_experts: int | None,
    layer: int | None,
) -> str:
    """Why the placement cannot be for this group and model; empty when it can."""
    if placement.topology.num_ranks != group.size():
        return (
            f"the placement is for {placement.topology.num_ranks} ranks, the group has "
            f"{group.size()}"
        )
    if num_experts is not None and placement.num_experts != num_experts:
        return (
            f"the placement is for another model: it has {placement.num_experts} "
            f"experts, the model has {num_experts}"
        )
    if layer is not None and layer not in placement.layer_ids:
        return (
            f"the placement is for another model: it has layers "
            f"{placement.layer_ids.tolist()}, not layer {layer}"
        )
    return ""


def agree(
    placement: Placement, group: dist.ProcessGroup, problem: str, wanted: str = ""
) -> None:
    """Raise on every rank of the group when any has a problem, or tables differ.

    `wanted` is what else must be the same on all ranks, in words.

    Raises
    ------
    InvalidPlacementError
        Naming the first rank that has one.
    """
    said: list[tuple[str, str, str]] = [("", "", "")] * group.size()
    mine = (problem, fingerprint(placement), wanted)
    dist.all_gather_object(said, mine, group=group)
    for rank, (trouble, _, _) in enumerate(said):
        if trouble:
            raise InvalidPlacementError(f"exchange: rank {rank}: {trouble}")
    _, first_print, first_wanted = said[0]
    for rank, (_, print_, other) in enumerate(said):
        if print_ != first_print:
            raise InvalidPlacementError(
                f"exchange: rank {rank} has another placement than rank 0 "
                f"(fingerprints {print_[:12]} and {first_print[:12]}): read the same "
                f"file on every rank"
            )
        if other != first_wanted:
            raise InvalidPlacementError(
                f"exchange: rank {rank} says {other}, rank 0 says {first_wanted}: "
                f"they must be the same on every rank"
            )
