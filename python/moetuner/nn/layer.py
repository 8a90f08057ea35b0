"""The MoE layer of a custom model: router, exchange, experts.

Legend: T tokens here, U tokens here afterwards, K top-k, E experts, S slots per rank, H
hidden.
"""

from __future__ import annotations

import inspect
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch.distributed.tensor import DTensor

from moetuner.errors import InvalidPlacementError, InvalidTraceError
from moetuner.nn.data_parallel import check_owned, ready_for_ddp
from moetuner.nn.exchange import Exchange
from moetuner.nn.exchange_options import ExchangeOptions, Residency
from moetuner.ops._ranges import ranged

if TYPE_CHECKING:
    import torch.distributed as dist

    from moetuner.nn.follow import Resident
    from moetuner.nn.replay import GivenRouting
    from moetuner.placement.model import Placement


class MoELayer(torch.nn.Module):
    """Routes tokens, sends them to their experts' ranks, and sums what returns.

    Every rank of the group has one, and calls it with its own tokens, of any number.

    Parameters
    ----------
    router
        [T, H] to ``(topk_ids, topk_weights)``: int32 or int64 [T, K], ids outside
        [0, E) being padding (beyond int32 refused), and [T, K]. Where it has
        ``num_experts``, that is checked.
    experts
        Rows [M, H] by slot and their end offsets int32 [S], to rows [M, H]; its own
        parameters have one row per slot: `Experts`, or your own. Row s is the expert
        in slot s of this rank; `Experts.take` makes them of a whole layer's.
    placement
        Which expert is in which slot; for the ranks of the group.
    group
        Its ranks hold the experts; None: all.
    layer
        The model's number of this layer; may be left out where the placement has one.
    options
        Residency; exact sizes or fixed capacity.

    Raises
    ------
    InvalidPlacementError
        On every rank, when the placement is for other ranks, another model or not the
        same on all of them, or the experts are not one per slot.

    Notes
    -----
    Traffic is always counted: ``layer.exchange.counts()``. In training, who divides
    which gradient, and what wrappers may do: `average_gradients`, `ready_for_ddp`,
    `expert_parameters`. Replicas of an expert drift apart unless `average_gradients`
    sums their gradients.

    Examples
    --------
    >>> import tempfile, torch, torch.distributed as dist
    >>> from moetuner.nn import Experts, MoELayer, TopKRouter, contiguous_placement
    >>> store = dist.FileStore(tempfile.mktemp(), 1)
    >>> dist.init_process_group("gloo", store=store, rank=0, world_size=1)
    >>> placement = contiguous_placement(num_layers=1, num_experts=4, num_ranks=1)
    >>> layer = MoELayer(TopKRouter(16, 4, top_k=2), Experts(4, 16, 8), placement)
    >>> layer(torch.randn(3, 5, 16)).shape
    torch.Size([3, 5, 16])
    >>> layer.exchange.counts().tokens
    15
    >>> dist.destroy_process_group()
    """

    def __init__(
        self,
        router: torch.nn.Module,
        experts: torch.nn.Module,
        placement: Placement,
        group: dist.ProcessGroup | None = None,
        *,
        layer: int | None = None,
        options: ExchangeOptions | None = None,
    ) -> None:
        super().__init__()
        self.router = router
        self.experts = experts
        wrong = wrong_rows(experts, placement.slots_per_rank)
        self.exchange = Exchange(
            placement,
            group,
            layer=layer,
            options=options,
            device=next((p.device for p in experts.parameters()), None),
            num_experts=getattr(router, "num_experts", None),
            problem=wrong,
        )
        self.given: GivenRouting | None = None
        ready_for_ddp(self)
        self.register_load_state_dict_post_hook(_follow_experts)  # type: ignore[no-untyped-call,unused-ignore]

    def forward(
        self, x: torch.Tensor, keys: torch.Tensor | None = None
    ) -> torch.Tensor | Resident:
        """Run the layer on [..., H].

        Parameters
        ----------
        x
            The tokens that are here now.
        keys
            For ``residency=follow``: whose they are, from the layer before.

        Returns
        -------
        torch.Tensor or Resident
            [..., H]; under ``follow`` a `Resident` of [U, H]: other tokens, with keys.
        """
        check_owned(self.experts, self.exchange)
        tokens = x.reshape(-1, x.shape[-1])
        topk_ids, topk_weights = route(self.router, tokens, self.given)
        if self.exchange.options.residency is Residency.FOLLOW:
            return self.exchange.follow(
                tokens, topk_ids, topk_weights, self.experts, keys
            )
        out: torch.Tensor = self.exchange(tokens, topk_ids, topk_weights, self.experts)
        return out.view(*x.shape[:-1], out.shape[-1])

    def get_extra_state(self) -> torch.Tensor:
        """What a state dict's rows are: slots of the layer, the rank; int32 [P + 1].

        All ranks use the same names, so what mixes their state dicts is told by the
        rank. It is -1 where experts are whole, as under ``logical_order(whole=True)``.
        """
        placement = self.exchange.placement
        row = self.exchange.tables.row_of(self.exchange.layer)
        first = next(self.experts.parameters(recurse=False), None)
        whole = first is not None and len(first) != placement.slots_per_rank
        rank = -1 if whole else self.exchange.tables.rank
        return torch.from_numpy(np.append(placement.slot_experts[row], np.int32(rank)))

    def set_extra_state(self, state: torch.Tensor) -> None:
        """Refuse weights that lie otherwise than this layer's placement says."""
        state, (*slots, rank) = state.cpu(), self.get_extra_state().tolist()
        mine, told = torch.tensor(slots, dtype=torch.int32), -1
        if len(state) == len(mine) + 1:
            state, told = state[:-1], int(state[-1])
        if not torch.equal(state, mine):
            raise InvalidPlacementError(
                f"MoELayer: layer {self.exchange.layer} is loaded from a state dict "
                f"whose slots hold {_short(state)}, but this layer's hold "
                f"{_short(mine)}: apply that placement first, or save and load under "
                f"logical_order"
            )
        width = self.exchange.slots_per_rank
        own, theirs = (slots[r * width :][:width] for r in (rank, told))
        if rank >= 0 and told >= 0 and own != theirs:
            raise InvalidPlacementError(
                f"MoELayer: layer {self.exchange.layer} of rank {rank} is loaded from "
                f"the experts of rank {told}: save a file for each rank, or save and "
                f"load under logical_order(whole=True)"
            )


class TopKRouter(torch.nn.Module):
    """The K largest of a softmax over E experts, their weights summing to one."""

    def __init__(self, hidden_size: int, num_experts: int, top_k: int) -> None:
        super().__init__()
        self.num_experts, self.top_k = num_experts, top_k
        self.linear = torch.nn.Linear(hidden_size, num_experts, bias=False)

    def forward(
        self, x: torch.Tensor, topk_ids: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Ids int64 [T, K] by falling weight, and weights float32 [T, K].

        With `topk_ids` those are taken, and weighted; ids outside [0, E) weigh nothing.
        """
        chances = self.linear(x).float().softmax(dim=-1)
        if topk_ids is None:
            weights, ids = chances.topk(self.top_k, dim=-1)
            return ids, weights / weights.sum(dim=-1, keepdim=True)
        inside = (topk_ids >= 0) & (topk_ids < self.num_experts)
        weights = chances.gather(1, topk_ids.long().masked_fill(~inside, 0))
        weights = weights.masked_fill(~inside, 0)
        total = weights.sum(dim=-1, keepdim=True).clamp(min=1e-20)
        return topk_ids, weights / total


@ranged
def route(
    router: torch.nn.Module, tokens: torch.Tensor, given: GivenRouting | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """The router, by the name of its range; or what is given instead."""
    if given is None:
        ids, weights = router(tokens)
        return ids, weights
    if len(given.topk_ids) != len(tokens):
        raise InvalidTraceError(
            f"MoELayer: routing was given for {len(given.topk_ids)} tokens, the layer "
            f"has {len(tokens)}"
        )
    if given.topk_weights is not None:
        return given.topk_ids, given.topk_weights
    if "topk_ids" not in inspect.signature(router.forward).parameters:
        raise InvalidTraceError(
            f"MoELayer: {type(router).__name__} cannot weight given experts: give "
            f"weights too, or let its forward take topk_ids"
        )
    ids, weights = router(tokens, topk_ids=given.topk_ids)
    return ids, weights


def _follow_experts(layer: MoELayer, incompatible: object) -> None:  # noqa: ARG001
    """``load_state_dict(assign=True)`` may have put them on another device."""
    for parameter in layer.experts.parameters():
        layer.exchange.go_to(local_share(parameter).device)


def wrong_rows(experts: torch.nn.Module, num_slots: int) -> str:
    """Why the experts cannot be those of the slots; empty when they can."""
    for name, parameter in experts.named_parameters(recurse=False):
        share = local_share(parameter)
        if share.dim() == 0 or len(share) != num_slots:
            return (
                f"experts.{name} is {list(share.shape)}, wanted one row for each "
                f"of the {num_slots} slots of a rank: see Experts.take"
            )
    return ""


def local_share(value: torch.Tensor) -> torch.Tensor:
    """The memory of a tensor on this rank: all of it, or a `DTensor`'s part."""
    tensor: torch.Tensor = value.detach()
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def _short(slots: torch.Tensor) -> str:
    head = ", ".join(str(int(expert)) for expert in slots[:6])
    return f"[{head}{', ...' if len(slots) > 6 else ''}]"
