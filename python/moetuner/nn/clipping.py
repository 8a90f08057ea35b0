"""The norm of all gradients where experts are on several ranks, and its limit.

Legend: S slots per rank.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor

from moetuner.nn.data_parallel import expert_parameters
from moetuner.nn.layer import local_share
from moetuner.nn.placed import layers_for
from moetuner.ops._collectives import group_named

if TYPE_CHECKING:
    from moetuner.nn.exchange import Exchange


@torch.no_grad()
def clip_gradients(model: torch.nn.Module, max_norm: float) -> torch.Tensor:
    """Scale gradients so that their norm over all ranks is at most `max_norm`.

    Every rank of the group calls this after `average_gradients`.
    ``torch.nn.utils.clip_grad_norm_`` sees a rank's own experts only: each rank would
    scale by another number, and what every rank has would drift apart. Here the experts
    of all ranks count, replicas once.

    Parameters
    ----------
    model
        As for `average_gradients`.
    max_norm
        Of the vector of all gradients, as one process would have it.

    Returns
    -------
    torch.Tensor
        The norm before, float32, the same on every rank; nothing waits for the device.

    Raises
    ------
    InvalidProblemError
        When the model has no placed experts.
    """
    otherwise = "use torch.nn.utils.clip_grad_norm_"
    layers = layers_for("clip_gradients", model, otherwise)
    owned = set(expert_parameters(model).values())
    exchanges = {
        parameter: exchange
        for experts, exchange in layers
        for parameter in experts.parameters(recurse=False)
    }
    mine = torch.zeros((), device=layers[0].exchange.counters.device)
    common = torch.zeros_like(mine)  # the sum over ranks is made in the memory of mine
    for parameter in model.parameters():
        gradient = parameter.grad
        if gradient is None:
            continue
        if parameter in owned:
            mine = mine + _squares(gradient, exchanges.get(parameter))
        else:
            common = common + _whole(torch.linalg.vector_norm(gradient)).float() ** 2
    dist.all_reduce(mine, group=group_named(layers[0].exchange.group_name))
    norm = (mine + common).sqrt()
    scale = (max_norm / (norm + 1e-6)).clamp(max=1.0)
    for parameter in model.parameters():
        if parameter.grad is not None:
            parameter.grad.mul_(scale.to(parameter.grad.dtype))
    return norm


def _squares(gradient: torch.Tensor, exchange: Exchange | None) -> torch.Tensor:
    """Sum of squares of this rank's experts; each replica has its share of the sum."""
    if exchange is None:  # of adapters and submodules, which have no row per slot
        return _whole(gradient).float().square().sum()
    row = exchange.tables.row_of(exchange.layer)
    slots = exchange.placement.slot_experts[row]
    own = exchange.tables.local_experts[row]
    number = np.bincount(slots[slots >= 0], minlength=exchange.placement.num_experts)
    shares = np.where(own >= 0, 1 / np.maximum(number[own], 1), 0)
    # A DTensor has the slots of one rank where FSDP shards them over ranks that hold
    # the same, those of all ranks where Transformers spread the experts.
    mine = _whole(gradient) if len(gradient) == len(own) else local_share(gradient)
    rows = mine.float().square().reshape(len(own), -1).sum(dim=1)
    weights = torch.from_numpy(shares.astype(np.float32))
    return rows @ weights.to(rows.device, non_blocking=True)


def _whole(value: torch.Tensor) -> torch.Tensor:
    return value.full_tensor() if isinstance(value, DTensor) else value
