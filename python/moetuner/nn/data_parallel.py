"""Experts that belong to one rank, beside wrappers that make all ranks alike.

Legend: G ranks, S slots per rank.
"""

from __future__ import annotations

import numpy as np
import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from moetuner.errors import InvalidProblemError
from moetuner.nn.exchange import ATTRIBUTE, Exchange
from moetuner.nn.placed import adapters, layers_for, placed_experts
from moetuner.ops._collectives import group_named

_TAKEN = "moetuner_taken"


def expert_parameters(model: torch.nn.Module) -> dict[str, torch.nn.Parameter]:
    """Parameters that are this rank's alone, by their names in `model`.

    Leave them out of whatever shards or averages parameters over the ranks that hold
    the experts: ``fully_shard(model, ignored_params=set(expert_parameters(model)
    .values()))``.

    Parameters
    ----------
    model
        With `MoELayer` modules, or a Transformers model that
        `moetuner.integrations.transformers.parallelize` has seen.
    """
    found: dict[str, torch.nn.Parameter] = {}
    for name, (experts, _) in placed_experts(model):
        # What lies deeper in a Transformers module is common to all its experts.
        deep = ATTRIBUTE not in vars(experts)
        found.update(experts.named_parameters(name, recurse=deep))
    for name, (adapter, _) in adapters(model):
        deeper = f"{name}.base_layer."
        rest = adapter.named_parameters(name)
        found.update((n, p) for n, p in rest if not n.startswith(deeper))
    return found


def ready_for_ddp(model: torch.nn.Module) -> torch.nn.Module:
    """Tell `DistributedDataParallel` to leave the experts to their ranks.

    Call this on the module that will be wrapped, before that: else the first rank's
    experts would overwrite all others', and the wrapped model refuses to run.
    A `MoELayer` by itself and a model that `parallelize` spread are ready.

    Returns
    -------
    torch.nn.Module
        The same model.
    """
    names = {*getattr(model, "_ddp_params_and_buffers_to_ignore", ())}
    for name in expert_parameters(model):
        names.update((name, f"_orig_mod.{name}"))  # as torch.compile(model) has it
    mark = DistributedDataParallel._set_params_and_buffers_to_ignore_for_model
    mark(model, sorted(names))  # type: ignore[no-untyped-call,unused-ignore]
    return model


def check_owned(experts: torch.nn.Module, exchange: Exchange) -> None:
    """Refuse experts that DDP or FSDP took for the same on every rank.

    Raises
    ------
    InvalidProblemError
        Saying which wrapper, and what to call before it.
    """
    if torch.compiler.is_compiling():
        return
    first = next(experts.parameters(), None)
    ddp = DistributedDataParallel._active_ddp_module
    if ddp is not None and id(first) in _taken_by(ddp):
        raise InvalidProblemError(
            f"DistributedDataParallel overwrote the experts of layer {exchange.layer} "
            f"by those of another rank: call moetuner.nn.ready_for_ddp(model) before "
            f"it wraps the model, and load the experts again"
        )
    if getattr(experts, "_is_fsdp_managed_module", False):
        group = dist.get_process_group_ranks(group_named(exchange.group_name))
        others = set(group) - {dist.get_rank()}
        if isinstance(first, DTensor):  # fully_shard on the experts by themselves
            others &= set(first.device_mesh.mesh.flatten().tolist())
        if others:
            raise InvalidProblemError(
                f"FSDP shards the experts of layer {exchange.layer} over ranks that "
                f"hold other experts: give fully_shard ignored_params=set(moetuner.nn."
                f"expert_parameters(model).values()), or call it on the experts alone, "
                f"with a mesh of ranks that hold the same ones"
            )


def _taken_by(ddp: DistributedDataParallel) -> frozenset[int]:
    """Identities of the parameters that it keeps alike, found once."""
    taken: frozenset[int] | None = vars(ddp).get(_TAKEN)
    if taken is None:
        taken = vars(ddp)[_TAKEN] = frozenset(map(id, ddp._module_parameters))
    return taken


@torch.no_grad()
def average_gradients(model: torch.nn.Module, *, shared: bool = True) -> None:
    """Make gradients those of the mean loss of all ranks' batches.

    Every rank of the group calls this between ``backward`` and ``step``, when each has
    computed the mean loss of its own, equally large batch. Experts have seen the
    tokens of all ranks, so their gradients are sums already, and are divided by G;
    replicas of an expert get the sum of theirs, and so stay equal. What every rank has
    is summed over ranks and divided by G.

    Parameters
    ----------
    model
        As for `expert_parameters`; not with ``shared_batch``, where every rank has
        whole gradients.
    shared
        False where DDP or FSDP averages what every rank has. Parameters that FSDP2
        shards are left to it in any case.

    Raises
    ------
    InvalidProblemError
        When the model has no placed experts.
    """
    otherwise = "no MoELayer, and parallelize was not called on it"
    layers = layers_for("average_gradients", model, otherwise)
    group = group_named(layers[0].exchange.group_name)
    owned = set(expert_parameters(model).values())
    for experts, exchange in layers:
        for parameter in experts.parameters():
            if parameter in owned and parameter.requires_grad:
                _sum_replicas(parameter, exchange, group)
    for parameter in owned:
        if parameter.grad is not None:
            parameter.grad /= group.size()
    if not shared:
        return
    for parameter in model.parameters():
        if parameter in owned or not parameter.requires_grad:
            continue
        if isinstance(parameter, DTensor):  # FSDP averages it
            continue
        if parameter.grad is None:  # unused here, perhaps not elsewhere
            parameter.grad = torch.zeros_like(parameter)
        dist.all_reduce(parameter.grad, group=group)
        parameter.grad /= group.size()


def _sum_replicas(
    parameter: torch.nn.Parameter, exchange: Exchange, group: dist.ProcessGroup
) -> None:
    row = exchange.tables.row_of(exchange.layer)
    slots = exchange.placement.slot_experts[row]
    mine = exchange.tables.local_experts[row]
    experts, number = np.unique(slots[slots >= 0], return_counts=True)
    replicated = experts[number > 1]
    if not replicated.size:
        return
    if parameter.grad is None:
        parameter.grad = torch.zeros_like(parameter)
    gradient = parameter.grad
    total = gradient.new_zeros(len(replicated), *gradient.shape[1:])
    places = np.argwhere(mine[None] == replicated[:, None]).tolist()
    for place, slot in places:
        total[place] += gradient[slot]
    dist.all_reduce(total, group=group)
    for place, slot in places:
        gradient[slot] = total[place]
