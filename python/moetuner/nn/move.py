"""Expert weights from where one placement has them to where another wants them.

Legend: E experts, G ranks, S slots per rank, P = G * S slots.
"""

from __future__ import annotations

from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor

from moetuner.errors import InvalidPlacementError
from moetuner.nn.agreement import agree, misfit
from moetuner.nn.layer import local_share, wrong_rows
from moetuner.nn.optimizer_state import states_of
from moetuner.nn.placed import (
    UNUSED_ROWS,
    Placed,
    placed_experts,
    what_adapts,
)
from moetuner.ops._collectives import group_named
from moetuner.placement.model import Placement, contiguous_rank_of
from moetuner.placement.tables import PlacementTables, fingerprint
from moetuner.placement.topology import Topology

if TYPE_CHECKING:
    from collections.abc import Iterator

    from numpy.typing import NDArray

    from moetuner.nn.exchange import Exchange


def contiguous_placement(
    num_layers: int, num_experts: int, num_ranks: int, ranks_per_node: int | None = None
) -> Placement:
    """Blocks of neighbouring experts on each rank, layers numbered from 0."""
    return Placement.from_rank_of(
        contiguous_rank_of(num_layers, num_experts, num_ranks),
        layer_ids=np.arange(num_layers, dtype=np.int32),
        topology=Topology(
            num_ranks=num_ranks, ranks_per_node=ranks_per_node or num_ranks
        ),
    )


def apply_placement(
    model: torch.nn.Module,
    placement: Placement,
    optimizer: torch.optim.Optimizer | None = None,
) -> Placement:
    """Move the expert weights of a model's layers between ranks, once.

    Every rank of the group calls this. Rows go straight from the old weight to the new
    one, weight by weight: **the memory peak is one more copy of the largest single
    weight of this rank** (its new slots), beside what is there.

    Parameters
    ----------
    model
        With `MoELayer` modules, or a Transformers model that
        `moetuner.integrations.transformers.parallelize` has seen.
    placement
        Where experts shall be; for the same ranks, layers and experts. Slots per rank
        may change.
    optimizer
        Its state of each expert moves along. Absent: what an optimizer knows of slots
        stays where it is, for other experts.

    Returns
    -------
    Placement
        The one until now: applying it undoes this.

    Raises
    ------
    InvalidPlacementError
        On every rank and before anything moves: as for `moetuner.nn.Exchange`, and
        when weights have gradients, experts have parameters of submodules, adapters
        around them, or buffers with a row per slot, or the optimizer has state without
        a row per slot: these would not move along.

    Notes
    -----
    A weight whose shape stays keeps its memory. Replicas are copies of the slot that
    `PlacementTables` names. Counters begin again.
    """
    layers = placed_layers(model)
    former = layers[0][1].placement
    group = group_named(layers[0][1].group_name)
    trouble = _trouble(layers, placement, group) or what_adapts(model)
    states, other = states_of(optimizer, [experts for experts, _ in layers])
    said = f"optimizer state {sorted({name for s in states.values() for name in s})}"
    agree(placement, group, trouble or other, said)
    for experts, exchange in layers:
        row = exchange.tables.row_of(exchange.layer)
        old = exchange.placement.slot_experts[row]
        exchange.set_placement(placement)
        new = placement.slot_experts[exchange.tables.row_of(exchange.layer)]
        source = _sources(old, new, exchange.placement.topology)
        for parameter in experts.parameters(recurse=False):
            for name, state in states.get(parameter, {}).items():
                resized = _move(state, source, group)
                if resized is not None and optimizer is not None:
                    optimizer.state[parameter][name] = resized
            _move(parameter, source, group)
    return former


@contextmanager
def logical_order(
    model: torch.nn.Module,
    *,
    whole: bool = False,
    optimizer: torch.optim.Optimizer | None = None,
) -> Iterator[None]:
    """Put experts back to where they would be without a placement, for a while.

    Every rank of the group enters and leaves this together. Rank r then holds the r-th
    block of neighbouring experts (where there are more ranks than experts, the last
    ranks hold none), so that ``state_dict``, a checkpoint or
    ``save_pretrained`` sees the logical order.

    Parameters
    ----------
    model
        As for `apply_placement`, with the same memory peak.
    whole
        Every rank holds all experts, [E, ...], as a model does that was never spread
        out: **the memory of the whole model**. It cannot run then, only be read and
        loaded: what is written there, alike on every rank, is kept.
    optimizer
        As for `apply_placement`: its state lies in logical order too; with `whole` it
        is this rank's block.

    Raises
    ------
    InvalidPlacementError
        As `apply_placement`.
    """
    layers = placed_layers(model)
    one = layers[0][1].placement
    plain = Placement.from_rank_of(
        _logical_rank_of(one), layer_ids=one.layer_ids, topology=one.topology
    )
    former = apply_placement(model, plain, optimizer)
    gathered: list[_Gathered] = []
    try:
        if whole:
            for experts, exchange in layers:
                for name, parameter in experts.named_parameters(recurse=False):
                    gathered.append(_gather(experts, name, parameter, exchange))
        yield
    finally:
        for weight in gathered:
            weight.cut_down()
        apply_placement(model, former, optimizer)


def _logical_rank_of(placement: Placement) -> NDArray[np.integer[Any]]:
    """[L, E] ranks of the experts as they lie without a placement."""
    layers, experts = placement.num_layers, placement.num_experts
    if experts < placement.topology.num_ranks:  # replicas are on the others
        return np.arange(experts)[None].repeat(layers, axis=0)
    num_ranks = placement.topology.num_ranks
    ranks: NDArray[np.int32] = contiguous_rank_of(layers, experts, num_ranks)
    return ranks


def placed_layers(model: torch.nn.Module) -> list[Placed]:
    """Experts and exchange of each layer, in the order of layers.

    Raises
    ------
    InvalidPlacementError
        When there is none, or their placements differ.
    """
    found = [placed for _, placed in placed_experts(model)]
    found.sort(key=lambda placed: placed.exchange.layer)
    if not found:
        raise InvalidPlacementError(
            f"{type(model).__name__} has no layer whose experts were placed: no "
            f"MoELayer, and parallelize was not called on it"
        )
    if len({fingerprint(exchange.placement) for _, exchange in found}) > 1:
        raise InvalidPlacementError(
            "the layers of the model have different placements: make all of them from "
            "the model's one placement, with layer="
        )
    return found


def _trouble(
    layers: list[Placed], placement: Placement, group: dist.ProcessGroup
) -> str:
    for experts, exchange in layers:
        trouble = misfit(
            placement, group, exchange.placement.num_experts, exchange.layer
        ) or wrong_rows(experts, exchange.slots_per_rank)
        if trouble:
            return trouble
        stays = _what_stays(experts, exchange.slots_per_rank)
        if stays:
            return (
                f"{stays} of the experts of layer {exchange.layer} would not move "
                f"along: only their own parameters do; make it one"
            )
        resized = placement.slots_per_rank != exchange.slots_per_rank
        if resized and any(isinstance(p, DTensor) for p in experts.parameters()):
            return (
                f"{placement.slots_per_rank} slots per rank, but weights that "
                f"Transformers spread over ranks have room for "
                f"{exchange.slots_per_rank}: for replicas, load the model whole and "
                f"parallelize it"
            )
        for name, parameter in experts.named_parameters(recurse=False):
            if parameter.grad is not None:
                return (
                    f"{name} of layer {exchange.layer} has a gradient, which would "
                    f"not move along: call zero_grad(set_to_none=True) first"
                )
    return ""


def _what_stays(experts: torch.nn.Module, num_slots: int) -> str:
    """A tensor that may belong to slots but is no parameter of the experts' own."""
    own = dict(experts.named_parameters(recurse=False))
    held = [n for n, _ in experts.named_parameters() if n not in own]
    held += [n for n, b in experts.named_buffers() if b.dim() and len(b) == num_slots]
    return held[0] if held else ""


def _sources(
    old: NDArray[np.int32], new: NDArray[np.int32], topology: Topology
) -> NDArray[np.int64]:
    """Old slot of the expert of each new slot, int64 [P]; -1 for an empty one.

    A slot of the same rank, else of the same node, else any; ranks take turns.
    """
    before = Placement(
        slot_experts=old[None],
        layer_ids=np.zeros(1, np.int32),
        num_experts=int(old.max()) + 1,
        topology=topology,
    )
    source = np.full(len(new), -1, np.int64)
    share = len(new) // topology.num_ranks
    for rank in range(topology.num_ranks):
        tables = PlacementTables.of(before, rank)
        for slot in range(rank * share, (rank + 1) * share):
            expert = new[slot]
            if expert >= 0:
                turn = rank % tables.num_candidates[0, expert]
                source[slot] = tables.candidates[0, expert, turn]
    return source


@torch.no_grad()
def _move(
    tensor: torch.Tensor, source: NDArray[np.int64], group: dist.ProcessGroup
) -> torch.Tensor | None:
    """Fill this rank's new rows: copies from here, messages from elsewhere.

    A parameter keeps being one; of other tensors the new one is returned, where there
    are more or fewer rows now.
    """
    rank, num_ranks = group.rank(), group.size()
    share = local_share(tensor)
    before, after = len(share), len(source) // num_ranks
    old = share.contiguous()
    new = old.new_zeros(after, *old.shape[1:])
    messages = []
    for slot, origin in enumerate(source.tolist()):
        if origin < 0:
            continue
        from_rank, from_row = divmod(origin, before)
        to_rank, to_row = divmod(slot, after)
        if from_rank == to_rank == rank:
            new[to_row] = old[from_row]
        elif from_rank == rank:
            messages.append(_message(dist.isend, old[from_row], to_rank, group))
        elif to_rank == rank:
            messages.append(_message(dist.irecv, new[to_row], from_rank, group))
    if messages:
        for work in dist.batch_isend_irecv(messages):
            work.wait()
    if new.shape == share.shape:
        share.copy_(new)
    elif isinstance(tensor, torch.nn.Parameter):
        tensor.data = new
    else:
        return new
    return None


def _message(
    operation: object, row: torch.Tensor, other: int, group: dist.ProcessGroup
) -> dist.P2POp:
    """One row, as bytes: every dtype travels."""
    peer = dist.get_global_rank(group, other)
    return dist.P2POp(operation, row.view(-1).view(torch.uint8), peer, group)  # type: ignore[no-untyped-call,arg-type,unused-ignore]


@torch.no_grad()
def _gather(
    module: torch.nn.Module,
    name: str,
    parameter: torch.nn.Parameter,
    exchange: Exchange,
) -> _Gathered:
    """Make a parameter whole, [E, ...]."""
    group = group_named(exchange.group_name)
    share = local_share(parameter)
    every = share.new_empty(group.size() * len(share), *share.shape[1:])
    dist.all_gather(list(every.chunk(group.size())), share.contiguous(), group=group)
    slots = exchange.placement.slot_experts[0]
    if len(every) > exchange.placement.num_experts:
        index = torch.from_numpy(np.flatnonzero(slots >= 0)).to(share.device)
        every = every[index]
    unused = vars(module).get(UNUSED_ROWS, {}).get(name, every[:0])
    parameter.data = torch.cat([every, unused.to(every.device, every.dtype)])
    row = exchange.tables.row_of(exchange.layer)
    return _Gathered(
        module=module,
        name=name,
        share=share,
        experts=exchange.tables.local_experts[row],
        parameter=parameter,
        version=parameter._version,
    )


@dataclass(frozen=True, kw_only=True, slots=True)
class _Gathered:
    """A parameter that is whole for a while, and the share that it was."""

    module: torch.nn.Module
    name: str
    share: torch.Tensor
    experts: NDArray[np.int32]
    parameter: torch.nn.Parameter
    version: int

    @torch.no_grad()
    def cut_down(self) -> None:
        """Back to the share; where something was written since, to that."""
        whole = self.module.get_parameter(self.name)
        if whole is not self.parameter or whole._version != self.version:
            for slot, expert in enumerate(self.experts.tolist()):
                if expert >= 0:
                    self.share[slot] = whole[expert]
        whole.data = self.share.to(whole.device, whole.dtype)
